"""Quantized layers without their expanded channels: what a plan computes, as one program for all blocks.

The blocks of a language model have the same shapes, and so have the layers here whatever the bits and the extra channels of
those they stand for.  What is jitted for one block serves all.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int

from fqjax.core.layer import LayerPlan, completed, fake_input
from fqjax.layers.linear import output_dtype


class Simulated(nnx.Module):
    """Computes what a quantized layer computes, in float32 on the channels as they were before they were expanded.

    Args:
      plan: of the layer.
      codes: of its weight, (N, K).
      bias: (N,) or None.
      dtype, param_dtype: as :class:`~fqjax.layers.linear.QuantizedLinear` has them.
    """

    def __init__(
        self,
        plan: LayerPlan,
        codes: Int[Array, "n k"],
        bias: Float[Array, " n"] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.transform, self.inputs = nnx.Variable(plan.transform), nnx.Variable(plan.inputs)
        self.weight = nnx.Variable(plan.grid.weight(codes))
        self.branches = nnx.List([nnx.Variable(branch) for branch in plan.branches]) if plan.branches else ()
        self.finish = None if plan.finish is None else nnx.Variable(plan.finish)
        self.bias = None if bias is None else nnx.Variable(bias)
        self.dtype, self.param_dtype = None if dtype is None else jnp.dtype(dtype), jnp.dtype(param_dtype)
        self.out_features, self.in_features = codes.shape

    @classmethod
    def of(cls, linear: nnx.Linear, plan: LayerPlan, codes: Int[Array, "n k"]) -> "Simulated":
        """The stand-in for a linear layer."""
        bias = plan.transform.bias(linear.kernel[...].T, None if linear.bias is None else linear.bias[...])
        return cls(plan, codes, bias, dtype=output_dtype(linear), param_dtype=linear.param_dtype)

    def __call__(self, x: Float[Array, "*rows k"]) -> Float[Array, "*rows out"]:
        added = [branch.get_value()(self.transform.get_value().inputs(x)) for branch in self.branches]
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        finish = None if self.finish is None else self.finish.get_value()
        y = completed(self.product(x), added, bias, finish)
        return y.astype(self.dtype or jnp.result_type(x.dtype, self.param_dtype))

    def product(self, x: Float[Array, "*rows k"]) -> Float32[Array, "*rows out"]:
        """The output without branches and bias, as float32."""
        return fake_input(self.transform.get_value(), self.inputs.get_value(), x) @ self.weight.get_value()().T
