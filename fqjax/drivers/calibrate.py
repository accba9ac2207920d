"""The first pass: every block runs on the outputs of the one before; its layers' statistics and their options are kept."""

from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
from flax import nnx

from fqjax.drivers.base import BlockRun, Pass, Run
from fqjax.drivers.candidates import Option, layer_options, shared_options
from fqjax.drivers.flow import Activations
from fqjax.drivers.statistics import Statistics, watch
from fqjax.layers.surgery import spoken
from fqjax.models.sites import reading_alike
from fqjax.runtime.errors import InputError

MAX_MAGNITUDE = 1e15
"""Largest weight, input and output that a layer may have: the sum of the squares of many is still finite in float32."""

MIN_MAGNITUDE = 1e-15
"""Least that the largest of them may be, unless it is 0: the square of a rounding error is still above 0."""

MIN_INPUT = 1e-8
"""The same of inputs: scales of tokens are no smaller than for this (:mod:`pallas_kernels.quantize.reference`)."""


class Calibrate(Pass):
    """Statistics of every layer's input, and the ways in which it can be quantized.

    Keeps ``("statistics", layer)``, ``("span", layer)``, ``("options", layer)`` and ``("outlines", layer)``.
    """

    name, title = "calibrated", "calibrating"

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        run = block.run
        seen = yield from watch(
            run.chain, block.path, block.module, block.names, run.feed.paired(inputs), run.sample_rows
        )
        self.keep(block, seen)

    def keep(self, block: BlockRun, seen: Mapping[str, Statistics]) -> None:
        """Keeps the statistics of a block's layers, by dotted path in the model, and the options that follow from them."""
        run = block.run
        for short, name in block.names.items():
            check_magnitudes(name, block.linears[short], seen[name])
        short_of = {name: short for short, name in block.names.items()}
        for names in reading_alike(run.chain.sites, short_of):
            linears = {name: block.linears[short_of[name]] for name in names}
            for name, options in self._options(run, linears, seen).items():
                run.store["options", name] = options
                run.store["outlines", name] = [option.outline() for option in options]
        for name, statistics in seen.items():
            run.store["statistics", name], run.store["span", name] = statistics, statistics.span()

    def _options(
        self, run: Run, layers: dict[str, nnx.Linear], seen: Mapping[str, Statistics]
    ) -> dict[str, list[Option]]:
        """The options of layers that read the same input."""
        unit = {name: names for names in run.units.values() for name in names}
        int4 = run.kept_in_int8.isdisjoint(name for layer in layers for name in unit[layer])
        if len(layers) > 1:
            return shared_options(layers, seen, run.method, run.sample_rows, int4=int4)
        return {name: layer_options(layers[name], seen[name], run.method, int4=int4) for name in layers}


def check_magnitudes(name: str, linear: nnx.Linear, statistics: Statistics) -> None:
    """Refuses a layer of which float32 does not hold what errors are judged by, the sums of squares.

    Raises:
      InputError: naming the layer.
    """
    weight, absmax = jnp.abs(linear.kernel[...].astype(jnp.float32)), jnp.asarray(statistics.absmax)
    largest = {"weights": jnp.max(weight), "inputs": jnp.max(absmax), "outputs": jnp.max(absmax @ weight)}
    for what, value in largest.items():
        least = MIN_INPUT if what == "inputs" else MIN_MAGNITUDE
        if value and not least <= float(value) <= MAX_MAGNITUDE:
            raise InputError(
                f"{spoken(name)}: its {what} reach {float(value):.3g} on the calibration data; expected from "
                f"{least:g} to {MAX_MAGNITUDE:g}, the squares of which float32 holds, all 0, or that it is ignored"
            )
