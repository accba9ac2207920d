"""The ways a layer can be quantized, what each costs, and which is taken."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, Int32

from fqjax.core.allocation import choose, histogram_divergence, select_low_bits
from fqjax.core.layer import LayerInputs, LayerPlan, channels_used, relative_error
from fqjax.core.table import bytes_of
from fqjax.drivers.codec import keepable
from fqjax.drivers.method import Method
from fqjax.drivers.settings import Allocation
from fqjax.drivers.statistics import Statistics, layer_inputs
from fqjax.layers.linear import layer_bytes
from fqjax.runtime.compiling import jit
from fqjax.runtime.errors import InputError

PADDING_ALLOWANCE = 1.05
"""How much of the least bytes of all is allowed whatever the compression asked for: small layers consist of padding."""
INT4_BYTES_SHARE_LIMIT = 0.85
"""INT4's bytes as a share of INT8's, above which no compression is asked for: where padding takes what INT4 saves, the few
layers that do get smaller would have to be INT4 whatever that costs."""


OutlineT = TypeVar("OutlineT", bound="Outline")


@keepable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """Numbers of one way to quantize a layer, all that a choice needs.

    Attributes:
      bits: of the weight.
      error: relative squared error of the layer's output on the calibration sample, weights rounded to the nearest.
      divergence: of the output's histogram, in nats (:func:`fqjax.core.allocation.histogram_divergence`).
      width: K' with its padding.
      bytes: of the layer on the device.
    """

    bits: int
    error: float
    divergence: float
    width: int
    bytes: int


@keepable
@dataclasses.dataclass(frozen=True, kw_only=True)
class Option(Outline):
    """One way to quantize a layer.

    Attributes:
      plan: of the layer.
    """

    plan: LayerPlan

    def outline(self) -> Outline:
        """The option without its arrays."""
        return Outline(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Outline)})


def layer_options(linear: nnx.Linear, statistics: Statistics, method: Method, *, int4: bool = True) -> list[Option]:
    """The options of a layer that a method considers: those in INT8 first, then those in INT4 if it may have any, by rising
    width.

    With the selection "budget" a layer may be flattened by as much as fills 0, 1, 2, ... blocks of the padding; else there
    is one option for each number of bits.
    """
    return _options(layer_inputs(linear, statistics, method.activation_percentile), linear, method, int4)


def shared_options(
    linears: Mapping[str, nnx.Linear],
    statistics: Mapping[str, Statistics],
    method: Method,
    sample_rows: int,
    *,
    int4: bool = True,
) -> dict[str, list[Option]]:
    """The options of layers that read the same input, experts of one mixture: as many for each, and all of the same number
    quantize the input alike.

    They are those of one layer with the outputs of all, judged on some samples of each; then every layer gets its part of the
    scales, and its own error.
    """
    if not method.shares_inputs:
        return {name: layer_options(linears[name], statistics[name], method, int4=int4) for name in linears}
    parts = {name: layer_inputs(linears[name], statistics[name], method.activation_percentile) for name in linears}
    each = -(-sample_rows // len(parts))
    whole = LayerInputs(
        jnp.concatenate([part.weight for part in parts.values()]),
        jnp.max(jnp.stack([part.x_max for part in parts.values()]), axis=0),
        jnp.concatenate([part.samples[:each] for part in parts.values()]),
    )
    found: dict[str, list[Option]] = {name: [] for name in linears}
    for option in _options(whole, next(iter(linears.values())), method, int4):
        for i, (name, linear) in enumerate(linears.items()):
            rows = slice(i * linear.out_features, (i + 1) * linear.out_features)
            plan = _of_rows(option.plan, rows, whole.weight)
            error, divergence = map(float, _judged(plan, parts[name]))
            size = plan_bytes(linear, plan, option.width)
            found[name].append(dataclasses.replace(option, plan=plan, error=error, divergence=divergence, bytes=size))
    return found


def _of_rows(plan: LayerPlan, rows: slice, weight: Float32[Array, "n k"]) -> LayerPlan:
    """The plan for some of a layer's outputs."""
    return dataclasses.replace(plan, grid=plan.grid.rows(rows, plan.transform.weight(weight[rows])))


@jit
def _judged(plan: LayerPlan, inputs: LayerInputs) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """The error and the divergence of a layer's output."""
    exact, rounded = inputs.samples @ inputs.weight.T, plan.grid.weight(plan.round(inputs.weight))
    given = plan.output(inputs.samples, rounded, inputs.weight)
    return relative_error(plan, rounded, inputs), histogram_divergence(exact, given)


def _options(inputs: LayerInputs, linear: nnx.Linear, method: Method, int4: bool) -> list[Option]:
    """:func:`layer_options`; ``linear`` says how large the layer is."""
    options = []
    share = method.allocation.int4_share
    allowed = {8: not int4 or share < 1, 4: int4 and share > 0}
    for bits in (bits for bits in allowed if allowed[bits]):
        found = _measured(inputs, method, bits)
        widths: list[int] = []
        for i, channels in enumerate(np.asarray(found.channels)):
            plan: LayerPlan = jax.tree.map(lambda leaf, i=i: leaf[i], found.plan)
            width = plan.grid.format.padded(int(channels))
            if width in widths:
                continue
            widths.append(width)
            size = plan_bytes(linear, plan, width)
            error, divergence = float(found.error[i]), float(found.divergence[i])
            options.append(Option(bits=bits, error=error, divergence=divergence, width=width, bytes=size, plan=plan))
    return options


def plan_bytes(linear: nnx.Linear, plan: LayerPlan, width: int) -> int:
    """Bytes on the device of the layer that a linear layer becomes, which may be abstract.

    Args:
      linear: may be abstract.
      plan: of the layer; its arrays are not used.
      width: K' with its padding.
    """
    besides = [*plan.branches, plan.finish, None if plan.transform.recipe() is not None else plan.transform]
    return layer_bytes(linear, plan.grid.format, type(plan.inputs).runs, width) + bytes_of(besides)


class _Measured(NamedTuple):
    """The plans of a layer, along the leading axis of every array.

    Attributes:
      plan: of all.
      channels: K', before padding.
      error, divergence: as :class:`Option` has them.
    """

    plan: LayerPlan
    channels: Int32[Array, " b"]
    error: Float32[Array, " b"]
    divergence: Float32[Array, " b"]


@functools.partial(jit, static_argnames=("method", "bits"))
def _measured(inputs: LayerInputs, method: Method, bits: int) -> _Measured:
    """Every plan of a layer, with the error of its output and the divergence of its histogram."""
    exact = inputs.samples @ inputs.weight.T

    def measure(plan: LayerPlan) -> _Measured:
        rounded = plan.grid.weight(plan.round(inputs.weight))
        divergence = histogram_divergence(exact, plan.output(inputs.samples, rounded, inputs.weight))
        error = relative_error(plan, rounded, inputs)
        return _Measured(plan, channels_used(plan, inputs.weight.shape[1]), error, divergence)

    plans = method.plans(inputs, bits)
    return lax.map(measure, jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans))


def select(
    options: Mapping[str, list[OutlineT]],
    macs: Mapping[str, int],
    plain_bytes: int,
    allocation: Allocation,
    sensitivities: Callable[[], Mapping[str, float]],
) -> dict[str, OutlineT]:
    """Chooses one option for every layer, by the allocation's selection.

    Args:
      options: of every layer.
      macs: multiply-accumulates of every layer.
      plain_bytes: of all of them in bfloat16.
      allocation: what is asked for.
      sensitivities: what each layer's last option costs the model; called only if it is needed.

    Raises:
      InputError: if layers kept in INT8 put the share of INT4 out of reach.
    """
    able = [name for name, found in options.items() if found[-1].bits < found[0].bits]
    check_share(allocation, sum(macs[name] for name in able), sum(macs[name] for name in options))
    if all(len(found) == 1 for found in options.values()):
        return {name: found[0] for name, found in options.items()}
    least = allocation.int4_share * sum(macs[name] for name in options)
    if allocation.selection != "budget":
        high, low = ({name: found[i] for name, found in options.items()} for i in (0, -1))
        if allocation.selection == "kl":
            errors = {name: low[name].divergence / max(high[name].divergence, 1e-10) for name in able}
        else:
            errors = sensitivities()
        chosen = select_low_bits([errors[name] for name in able], [macs[name] for name in able], least)
        return high | {name: low[name] for name, is_low in zip(able, chosen, strict=True) if is_low}
    measured = sensitivities()
    tables = [
        (_costs(found, measured[n]),
         [macs[n] * (o.bits == 4) for o in found],
         [o.bytes for o in found])
        for n, found in options.items()
    ]  # fmt: skip
    errors, low_macs, sizes = map(list, zip(*tables, strict=True))
    smallest = sum(min(row) for row in sizes)
    padded = allocation.int4_share < 1 and smallest > INT4_BYTES_SHARE_LIMIT * sum(row[0] for row in sizes)
    asked = allocation.compression and not padded
    most = max(plain_bytes / allocation.compression, PADDING_ALLOWANCE * smallest) if asked else float("inf")
    picked = choose(errors, low_macs, sizes, least_macs=least, most_bytes=most)
    return {name: found[i] for (name, found), i in zip(options.items(), picked, strict=True)}


def check_share(allocation: Allocation, able: float, macs: float) -> None:
    """Checks that a share of INT4 can be had; a share of 1 is all that may be in INT4, however little that is.

    Args:
      allocation: its ``int4_share``.
      able: multiply-accumulates of the layers that may be in INT4.
      macs: of all layers.

    Raises:
      InputError: naming the share that can be reached.
    """
    if allocation.int4_share < 1 and able < allocation.int4_share * macs:
        raise InputError(
            f"int4_share={allocation.int4_share}: out of reach, as layers kept in INT8 leave {able / macs:.4f} of the "
            "multiply-accumulates to INT4"
        )


def costs_by_bits(
    options: Mapping[str, list[Outline]], chosen: Mapping[str, Outline], sensitivities: Mapping[str, float]
) -> dict[str, dict[int, float]]:
    """Cost of each layer to the model, by the bits of its weight: as chosen, or with the other bits as little as can be."""
    found: dict[str, dict[int, float]] = {}
    for name, choices in options.items():
        costs: dict[int, list[float]] = {}
        for option, cost in zip(choices, _costs(choices, sensitivities[name]), strict=True):
            if option is chosen[name] or option.bits != chosen[name].bits:
                costs.setdefault(option.bits, []).append(cost)
        found[name] = {bits: min(some) for bits, some in costs.items()}
    return found


def _costs(options: Sequence[Outline], last: float) -> list[float]:
    """Cost of each option to the model: that of the last one, times how much smaller or larger its own error is."""
    return [last * option.error / max(options[-1].error, 1e-30) for option in options]
