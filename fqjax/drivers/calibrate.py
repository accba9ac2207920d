"""The first pass: every block runs on the outputs of the one before; its layers' statistics and their options are kept."""

from collections.abc import Iterable, Iterator

from flax import nnx

from fqjax.drivers.base import BlockRun, Pass, Run
from fqjax.drivers.candidates import Option, layer_options, shared_options
from fqjax.drivers.flow import Activations
from fqjax.drivers.statistics import Statistics, watch
from fqjax.models.sites import reading_alike


class Calibrate(Pass):
    """Statistics of every layer's input, and the ways in which it can be quantized.

    Keeps ``("statistics", layer)``, ``("span", layer)``, ``("options", layer)`` and ``("outlines", layer)``.
    """

    name, title = "calibrated", "calibrating"

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        run = block.run
        seen = yield from watch(run.chain, block.module, block.names, run.feed.paired(inputs), run.sample_rows)
        short_of = {name: short for short, name in block.names.items()}
        for names in reading_alike(run.chain.sites, short_of):
            linears = {name: block.linears[short_of[name]] for name in names}
            for name, options in self._options(run, linears, seen).items():
                run.store["options", name] = options
                run.store["outlines", name] = [option.outline() for option in options]
        for name, statistics in seen.items():
            run.store["statistics", name], run.store["span", name] = statistics, statistics.span()

    def _options(self, run: Run, layers: dict[str, nnx.Linear], seen: dict[str, Statistics]) -> dict[str, list[Option]]:
        """The options of layers that read the same input."""
        unit = {name: names for names in run.units.values() for name in names}
        int4 = run.kept_in_int8.isdisjoint(name for layer in layers for name in unit[layer])
        if len(layers) > 1:
            return shared_options(layers, seen, run.method, run.sample_rows, int4=int4)
        return {name: layer_options(layers[name], seen[name], run.method, int4=int4) for name in layers}
