"""From a layer's integer view to the layer that runs."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from fqjax.core.channels import expansion, flatten_codes
from fqjax.core.codes import qmax
from fqjax.core.formats.uniform import WideLinear, relative_error
from fqjax.core.layer import LayerInputs
from fqjax.core.qtensor import InputQuantizer, QTensor
from fqjax.drivers.statistics import Span, Statistics
from fqjax.layers.linear import LayerSummary, QuantizedLinear, measured_bound
from fqjax.runtime.compiling import jit


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
    name: str, linear: nnx.Linear, wide: WideLinear, inputs: LayerInputs, recipe: str, macs: int
) -> QuantizedLinear:
    """The layer that runs, of its integer view.

    Raises:
      InputError: naming the layer, if its int32 accumulator could overflow.
    """
    weight, quantizer = expand(wide)
    error = float(_relative_error(wide, inputs.samples, inputs.weight))
    bound = measured_bound(weight, quantizer)
    summary = LayerSummary(recipe=recipe, relative_error=error, accumulator_bound=bound, macs=macs)
    bias = None if linear.bias is None else linear.bias[...]
    return QuantizedLinear(
        weight, quantizer, bias, dtype=linear.dtype, param_dtype=linear.param_dtype, summary=summary, name=name
    )


_relative_error = jit(relative_error)


def expand(wide: WideLinear) -> tuple[QTensor, InputQuantizer]:
    """Lays a layer's integer view out over K' channels, as the integer matmul needs it."""
    source, x_part, w_part, used = expansion(np.asarray(wide.x_pieces), np.asarray(wide.w_pieces), wide.bits)
    weight = _expand_weight(wide, jnp.asarray(source), jnp.asarray(w_part))
    quantizer = InputQuantizer(
        multiplier=wide.multiplier,
        source=jnp.asarray(source),
        part=jnp.asarray(x_part),
        scale=wide.x_scale,
        bits=wide.x_bits,
        used=used,
    )
    return weight, quantizer


@jax.jit
def _expand_weight(wide: WideLinear, source: Int32[Array, " e"], part: Int32[Array, " e"]) -> QTensor:
    if wide.group_scale is None:
        codes = flatten_codes(wide.w_codes, source, part, qmax(wide.bits))
        return QTensor.from_codes(codes, wide.w_scale, wide.bits)
    codes = jnp.pad(wide.w_codes.astype(jnp.int8), ((0, 0), (0, len(source))))
    missing = codes.shape[1] // wide.group_size - len(wide.group_scale)
    groups = jnp.pad(wide.group_scale, ((0, missing), (0, 0)), constant_values=1)
    folded = jnp.issubdtype(groups.dtype, jnp.integer)  # A method makes no other integer scales.
    groups = groups.astype(jnp.int16) if folded else groups  # They are from 1 to 15.
    return QTensor.from_codes(codes, wide.w_scale, wide.bits, groups, folded=folded)
