"""From a layer's plan and codes to the layer that runs."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from fqjax.core.channels import lay_out
from fqjax.core.codes import NO_CODE
from fqjax.core.formats.base import QTensor
from fqjax.core.layer import LayerInputs, LayerPlan, relative_error
from fqjax.core.stored_inputs import StoredInput
from fqjax.drivers.statistics import Span, Statistics
from fqjax.layers.linear import QuantizedLinear, output_dtype
from fqjax.layers.record import Figures
from fqjax.layers.surgery import spoken
from fqjax.runtime.compiling import jit
from fqjax.runtime.errors import InputError


def count_macs(linears: Mapping[str, nnx.Linear], statistics: Mapping[str, Statistics | Span]) -> dict[str, int]:
    """Multiply-accumulates of each layer for one token: K * N, times the calls a token makes; for experts, on average.

    Args:
      linears: by dotted path.
      statistics: of each of them.

    The layer that the fewest rows passed counts as called once a token.
    """
    once = min(seen.passed for seen in statistics.values())
    return {
        name: round(linear.in_features * linear.out_features * statistics[name].rows / once)
        for name, linear in linears.items()
    }


def assemble(
    name: str,
    linear: nnx.Linear,
    plan: LayerPlan,
    codes: Int[Array, "n k"],
    inputs: LayerInputs,
    *,
    macs: int,
    recipe: str = "",
) -> QuantizedLinear:
    """The layer that runs.

    Args:
      name: of the layer, for messages.
      linear: that it stands for.
      plan: of the layer.
      codes: of its weight, (N, K).
      inputs: on which its error is measured.
      macs: multiply-accumulates of the layer for one token.
      recipe: what it is quantized with.

    Raises:
      InputError: naming the layer, if its int32 accumulator could overflow, or its weight could not be rounded.
    """
    weight, quantizer, flattened = expand(name, plan, codes)
    figures = Figures(
        relative_error=float(measured_error(plan, plan.grid.weight(codes), inputs)),
        accumulator_bound=weight.bound(quantizer.qmax),
        macs=macs,
        flattened=flattened,
    )
    bias = plan.transform.bias(inputs.weight, None if linear.bias is None else linear.bias[...])
    return QuantizedLinear(
        weight,
        quantizer,
        bias,
        dtype=output_dtype(linear),
        param_dtype=linear.param_dtype,
        figures=figures,
        recipe=recipe,
        transform=None if plan.transform.recipe() is not None else plan.transform,
        branches=plan.branches,
        finish=plan.finish,
        name=spoken(name),
    )


measured_error = jit(relative_error)


def expand(name: str, plan: LayerPlan, codes: Int[Array, "n k"]) -> tuple[QTensor, StoredInput, int]:
    """Lay a plan out over K' channels, as the integer matmul needs it.

    Returns:
      The weight, the quantizer of the input, and the number of extra channels that hold something.

    Raises:
      InputError: naming the layer, if a weight was NaN when it was rounded.
    """
    if not bool(jnp.all(codes != NO_CODE)):
        raise InputError(f"{spoken(name)}: rounding its weight gave values that are not finite")
    channels = lay_out(plan.inputs.pieces, plan.grid.pieces, codes.shape[1], plan.grid.format.multiple)
    return plan.grid.pack(codes, channels), plan.inputs.stored(plan.transform.recipe(), channels), channels.used
