"""The output head in INT8: the table that turns hidden states into logits, and tokens into embeddings where both are one.

Every row of the table, which is a token's, has a scale of its own, and so has every hidden state: the product of their codes
is exact in int32, and the two scales are multiplied onto it.  Where a model ties its embeddings to its head, the one table
serves both, as it did in floating point: keeping the float table for the lookup would take three bytes an entry, where there
were two.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Int32

from fqjax.core.channels import rounded_up
from fqjax.core.overflow import accumulator_bound, check_accumulator
from fqjax.layers.linear import QuantizedVariable
from fqjax.layers.surgery import replace_modules
from fqjax.runtime.errors import InputError
from pallas_kernels import int8_matmul, quantize_per_token

ModelT = TypeVar("ModelT", bound=nnx.Module)


def padded_head_width(features: int) -> int:
    """K' of a table with K features."""
    return rounded_up(features, 128)


class Int8Table(nnx.Module):
    """A table (vocabulary, K) in INT8, for logits and for lookups.

    Attributes:
      codes: int8 (vocabulary, K'), padded with zeros to the width that the matmul takes.
      scale: float32 (vocabulary,); real entry = code * scale.
      features: K.
      dtype: of what is looked up.

    Raises:
      InputError: when it is built, if the int32 accumulator could overflow.
    """

    def __init__(
        self,
        codes: Int8[Array, "vocabulary width"],
        scale: Float32[Array, " vocabulary"],
        *,
        features: int,
        dtype: DTypeLike,
    ):
        check_accumulator(accumulator_bound(127 * features, 127), "output head")
        self.codes, self.scale = QuantizedVariable(codes), QuantizedVariable(scale)
        self.features, self.dtype = features, jnp.dtype(dtype)

    def __call__(self, tokens: Int32[Array, "..."]) -> Float[Array, "... features"]:
        """The rows of some tokens."""
        codes, scale = self.codes.get_value()[tokens], self.scale.get_value()[tokens]
        return (codes[..., : self.features].astype(jnp.float32) * scale[..., None]).astype(self.dtype)

    def logits(self, hidden: Float[Array, "... features"]) -> Float32[Array, "... vocabulary"]:
        """Products with every row."""
        table = self.codes.get_value()
        codes, scale = quantize_per_token(hidden, jnp.ones(self.features), qmax=127, width=table.shape[1])
        return int8_matmul(codes, table, scale, self.scale.get_value(), out_dtype=jnp.float32)


def unembed(
    hidden: Float[Array, "... hidden"], head: nnx.Embed | nnx.Linear | Int8Table
) -> Float32[Array, "... vocabulary"]:
    """Logits by an ``nnx.Embed``, an ``nnx.Linear`` or an :class:`Int8Table`; accumulated and returned in float32."""
    if isinstance(head, Int8Table):
        return head.logits(hidden)
    table = head.embedding[...] if isinstance(head, nnx.Embed) else head.kernel[...].T
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def with_int8_head(model: ModelT) -> ModelT:
    """The model with its output head in INT8, and with it its embeddings if they are tied to it.

    Raises:
      InputError: if the model does not say which of its modules the head is (``head_name``), or that module is neither an
        ``nnx.Embed`` nor an ``nnx.Linear`` without a bias, or holds a value that is not finite.
    """
    name = head_of(model)
    head: object = getattr(model, name)
    if isinstance(head, Int8Table):
        return model
    if isinstance(head, nnx.Embed):
        table, dtype = head.embedding[...], head.dtype
    elif isinstance(head, nnx.Linear) and head.bias is None:
        table, dtype = head.kernel[...].T, head.dtype
    else:
        raise InputError(
            f"int8_head: {name} is a {type(head).__name__}; expected an nnx.Embed or an nnx.Linear without bias"
        )
    if not bool(jnp.isfinite(table).all()):
        raise InputError(f"{name}: its weight holds a value that is not finite")
    codes, scale = _quantized(table)
    made = Int8Table(codes, scale, features=table.shape[1], dtype=dtype or table.dtype)
    return replace_modules(model, {name: made})


def head_of(model: object) -> str:
    """Name of the module that is the model's output head.

    Raises:
      InputError: if the model does not say.
    """
    name = getattr(model, "head_name", None)
    if not isinstance(name, str):
        raise InputError("int8_head: the model does not say which of its modules is the output head (head_name)")
    return name


@jax.jit
def _quantized(table: Array) -> tuple[Int8[Array, "vocabulary width"], Float32[Array, " vocabulary"]]:
    features = table.shape[1]
    return quantize_per_token(table, jnp.ones(features), qmax=127, width=padded_head_width(features))
