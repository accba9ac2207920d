"""Quantization as passes over the blocks of a model, of which one is needed at a time.

1. Calibration: every block runs on the outputs of the one in front; its layers' statistics and their options are kept.
2. Trial, where the choice needs it: every layer runs quantized alone, and its output goes through the blocks behind it.
3. Rounding: every layer is rounded as was chosen; with GPTQ, block by block on what the quantized blocks in front give.

Between passes only small results are held.  What is large, samples of activations and grids of options, is a
:class:`~fqjax.drivers.store.Memo`'s to keep: in memory, or in files.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32

from fqjax.core.formats.uniform import WideLinear, relative_square
from fqjax.core.layer import LayerInputs
from fqjax.drivers.assemble import assemble, count_macs
from fqjax.drivers.candidates import costs_by_bits, layer_inputs, layer_options, select, shared_options
from fqjax.drivers.moments import compensated, propagated, twice
from fqjax.drivers.settings import Compensated
from fqjax.drivers.statistics import Statistics, watch
from fqjax.drivers.store import Memo
from fqjax.drivers.ties import choices, shared_inputs, units_of
from fqjax.drivers.trial import sensitivities
from fqjax.layers.integer_scales import with_integer_scales
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import widened
from fqjax.layers.surgery import find_linears
from fqjax.models.chain import Chain, Feed, Simulated, places
from fqjax.report.findings import Findings
from fqjax.runtime.compiling import jit
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme

Keep = Callable[[dict[str, QuantizedLinear]], None]
"""Takes the finished layers of a block, by dotted path in the model."""


def quantize_blocks(
    memo: Memo,
    parts: Chain,
    linears: Mapping[str, nnx.Linear],
    scheme: Scheme,
    calibration: Iterable[Any],
    keep: Keep,
) -> Findings:
    """Quantizes a model's linear layers.

    Args:
      memo: keeps what the passes find out; an unfinished quantization goes on from there.
      parts: the float model, equalized where the scheme says so.
      linears: layers to quantize, by dotted path in the model's order; their arrays are not used and may be abstract.
      scheme: with a method.
      calibration: model inputs.
      keep: is given the finished layers, block after block.

    Raises:
      InputError: as :func:`fqjax.quantize` does.
    """
    # On a GPU, float32 would else be multiplied with 10 bits of mantissa.
    with jax.default_matmul_precision("float32"):
        return _Passes(memo, parts, linears, scheme, calibration).run(keep)


class _Passes:
    """One quantization: what it was asked for, and once they are known each layer's macs, chosen option, and width."""

    macs: dict[str, int]
    chosen: dict[str, int]
    widths: dict[str, int]

    def __init__(
        self,
        memo: Memo,
        parts: Chain,
        linears: Mapping[str, nnx.Linear],
        scheme: Scheme,
        calibration: Iterable[Any],
    ):
        assert scheme.method is not None
        self.memo, self.parts, self.linears, self.scheme = memo, parts, linears, scheme
        self.method, self.compensating = scheme.method, isinstance(scheme.method.rounding, Compensated)
        self.int8_only = scheme.kept_in_int8(linears)
        self.recipe = scheme.recipe()
        self.units = units_of(linears)
        self.first, batches = _peek(calibration)
        # GPTQ goes through the batches once more.
        self.feed = Feed(parts, list(batches) if self.compensating else batches)
        self.inside = places(parts.blocks, linears)

    def run(self, keep: Keep) -> Findings:
        self.memo.sweep("calibrated", self.parts.blocks, self.feed.first, self._calibrate, "calibrating")
        seen = {name: span for path in self.parts.blocks for name, span in self.memo.spans(path).items()}
        self.macs = count_macs(self.linears, seen)
        choosing = {
            unit: choices({name: self.memo.outlines(name) for name in names}, self.macs)
            for unit, names in self.units.items()
        }
        options = {unit: [choice.outline for choice in some] for unit, some in choosing.items()}
        macs = {unit: sum(self.macs[name] for name in names) for unit, names in self.units.items()}
        tried = functools.cache(lambda: self.memo.sensitivities(lambda: self._try_all()))
        parameters = jax.tree.leaves([nnx.state(linear, nnx.Param) for linear in self.linears.values()])
        chosen = select(options, macs, 2 * sum(leaf.size for leaf in parameters), self.method.allocation, tried)
        self.chosen, self.widths = {}, {}
        for unit, option in chosen.items():
            picked = choosing[unit][options[unit].index(option)].options
            self.chosen |= picked
            self.widths |= dict.fromkeys(picked, max(self.memo.outlines(name)[i].width for name, i in picked.items()))
        first = functools.partial(twice, self.feed) if self.compensating else list
        self.memo.sweep("rounded", self.parts.blocks, first, functools.partial(self._round, keep), "quantizing")
        costs = costs_by_bits(options, chosen, tried()) if tried.cache_info().currsize else {}
        return Findings({name: seen[name].absmax for name in self.linears}, self._divided(costs, macs))

    def _divided(self, costs: Mapping[str, dict[int, float]], macs: Mapping[str, int]) -> dict[str, dict[int, float]]:
        """The costs of units as costs of their layers, in proportion to the multiply-accumulates."""
        found = {}
        for unit, cost in costs.items():
            for name in self.units[unit]:
                share = self.macs[name] / macs[unit] if macs[unit] else 1 / len(self.units[unit])
                found[name] = {bits: share * value for bits, value in cost.items()}
        return found

    def _calibrate(self, path: str, block: nnx.Module, inputs: Iterable[Any]) -> Iterator[Any]:
        rows = self.scheme.sample_rows
        seen = yield from watch(self.parts, block, self.inside[path], self.feed.paired(inputs), rows)
        linears, inside = find_linears(block), self.inside[path]
        unit = {name: names for names in self.units.values() for name in names}
        shared = shared_inputs(block, inside)
        for shorts in shared + [(short,) for short in inside if not any(short in some for some in shared)]:
            layers = {inside[short]: linears[short] for short in shorts}
            int4 = self.int8_only.isdisjoint(name for layer in layers for name in unit[layer])
            if len(layers) > 1:
                found = shared_options(layers, seen, self.method, rows, int4=int4)
            else:
                found = {name: layer_options(layers[name], seen[name], self.method, int4=int4) for name in layers}
            for name, options in found.items():
                self.memo.keep_options(name, options)
        self.memo.keep_statistics(path, seen)

    def _try_all(self) -> dict[str, float]:
        """What the last option of each unit's layers costs the model."""

        def low(path: str, block: nnx.Module) -> dict[str, QuantizedLinear]:
            linears, seen = find_linears(block), self.memo.statistics(path)
            return {
                short: self._nearest(name, linears[short], seen[name], -1, remember=True)
                for short, name in self.inside[path].items()
            }

        go = functools.partial(self.memo.sweep, "tried")
        return sensitivities(self.parts, list(self.linears), low, self.first, go, self.units)

    def _round(self, keep: Keep, path: str, block: nnx.Module, inputs: Iterable[Any]) -> Iterator[Any]:
        linears, seen = find_linears(block), self.memo.statistics(path)
        inside, rounding, amplifier = self.inside[path], self.method.rounding, self.method.integer_amplifier

        def nearest() -> dict[str, QuantizedLinear]:
            return {
                short: self._nearest(name, linears[short], seen[name], self.chosen[name])
                for short, name in inside.items()
            }

        if isinstance(rounding, Compensated):
            grids = {short: self.memo.options(name)[self.chosen[name]].grid for short, name in inside.items()}
            finish = {
                short: functools.partial(self._assemble, name, linears[short], seen[name])
                for short, name in inside.items()
            }
            layers = compensated(self.parts, block, nearest, grids, self.feed, inputs, finish, rounding)
        else:
            layers = nearest()
        finished = layers
        if amplifier is not None:
            finished = {
                short: _with_integer_scales(
                    layer, amplifier, layer_inputs(linears[short], seen[inside[short]], self.method)
                )
                for short, layer in layers.items()
            }
        keep({inside[short]: widened(layer, self.widths[inside[short]]) for short, layer in finished.items()})
        if self.compensating and path != next(reversed(self.inside)):
            yield from propagated(self.parts, block, layers, self.feed, inputs)

    def _nearest(
        self, name: str, linear: nnx.Linear, seen: Statistics, option: int, *, remember: bool = False
    ) -> QuantizedLinear:
        """The layer with its weight rounded to the nearest codes of one of its options."""
        found = self.memo.options(name)[option]

        def compute() -> QuantizedLinear:
            weight = layer_inputs(linear, seen, self.method).weight
            return self._assemble(name, linear, seen, lambda: found.grid.round(weight))

        return self.memo.layer(name, f"int{found.bits}.nearest{found.width}", compute, remember=remember)

    def _assemble(
        self, name: str, linear: nnx.Linear, seen: Statistics, view: Callable[[], WideLinear]
    ) -> QuantizedLinear:
        wide = view()  # Before the weight in float32 is there, as rounding may take much memory itself.
        return assemble(name, linear, wide, layer_inputs(linear, seen, self.method), self.recipe, self.macs[name])


def _with_integer_scales(layer: QuantizedLinear, amplifier: int, inputs: LayerInputs) -> QuantizedLinear:
    """The layer with integer scales, where they are safe, and its error measured again."""
    changed = with_integer_scales(layer, amplifier)
    error = _relative_error(Simulated(changed), inputs)
    summary = dataclasses.replace(changed.summary, relative_error=float(error))
    return changed.with_summary(summary)


@jit
def _relative_error(layer: Simulated, inputs: LayerInputs) -> Float32[Array, ""]:
    return relative_square(layer.product(inputs.samples), inputs.samples @ inputs.weight.T)


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and an iterable that still begins with it."""
    if isinstance(batches, np.ndarray | jax.Array):
        raise InputError("calibration: expected an iterable of batches, got one array; pass a list of it")
    if isinstance(batches, Sequence) and batches:
        return batches[0], batches  # As it is, so that progress can say how much is left.
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise InputError("calibration: the data holds no batch")
    return first, itertools.chain([first], iterator)
