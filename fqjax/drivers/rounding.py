"""The last pass: every layer is rounded as was chosen, and becomes one that runs."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

from jaxtyping import Array, Int

from fqjax.core.layer import LayerInputs, LayerPlan
from fqjax.drivers.assemble import assemble, measured_error
from fqjax.drivers.base import BlockRun, Pass
from fqjax.drivers.flow import Activations, Pair
from fqjax.drivers.method import Method
from fqjax.drivers.moments import compensated, propagated
from fqjax.drivers.settings import Compensated
from fqjax.drivers.trial import nearest, rounded
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.simulated import Simulated

Codes = Callable[[], Int[Array, "n k"]]


class RoundNearest(Pass):
    """Weights rounded to the nearest codes; no block is run."""

    name, title, inputs = "rounded", "quantizing", "none"

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        plans, linears = chosen_plans(block), block.linears
        finish(block, plans, {s: functools.partial(rounded, plan, linears[s].kernel[...]) for s, plan in plans.items()})
        return iter(())


class RoundCompensated(Pass):
    """Weights rounded by GPTQ, block by block on what the quantized blocks before give (:mod:`fqjax.drivers.moments`)."""

    name, title, inputs = "rounded", "quantizing", "both"

    def __init__(self, rounding: Compensated):
        self.rounding = rounding

    def block(self, block: BlockRun, inputs: Iterable[Activations]) -> Iterator[Activations]:
        run, plans, pairs = block.run, chosen_plans(block), cast("Iterable[Pair]", inputs)

        def rough() -> dict[str, Simulated]:
            return {short: nearest(block.linears[short], plan) for short, plan in plans.items()}

        codes = compensated(
            run.chain, block.module, rough, plans, run.feed, pairs, self.rounding.upstream, self.rounding.damping
        )
        is_last = block.path == next(reversed(run.inside))
        kept = finish(block, plans, codes, simulate=not is_last)
        if not is_last:
            yield from propagated(run.chain, block.module, kept, run.feed, pairs)


def chosen_plans(block: BlockRun) -> dict[str, LayerPlan]:
    """The plan of every layer of a block, by dotted path in it."""
    store = block.run.store
    chosen = store["chosen",]
    return {short: store["options", name][chosen[name]].plan for short, name in block.names.items()}


def finish(
    block: BlockRun, plans: Mapping[str, LayerPlan], codes: Mapping[str, Codes], *, simulate: bool = False
) -> dict[str, Simulated]:
    """Make the layers of a block that run, and hand them to whoever keeps them.

    Args:
      block: of the float model.
      plans: of its layers, by dotted path in the block.
      codes: makes the codes of each layer's weight; called once each.
      simulate: whether the layers are needed to go on with the next block.

    Returns:
      The layers as they behave before their scales are made integers, if they are needed.
    """
    run, made, kept = block.run, {}, {}
    macs, widths, recipe = run.macs(), run.store["widths",], run.recipe
    for short, name in block.names.items():
        linear, plan = block.linears[short], plans[short]
        found = codes[short]()  # Before the weight in float32 is there, as rounding may take much memory itself.
        inputs = block.inputs(short)
        layer = assemble(name, linear, plan, found, inputs, macs=macs[name], recipe=recipe)
        made[name] = _finished(layer, plan, inputs, run.method).widened(widths[name])
        if simulate:
            kept[short] = Simulated.of(linear, plan, found)
    run.keep(made)
    return kept


def _finished(layer: QuantizedLinear, plan: LayerPlan, inputs: LayerInputs, method: Method) -> QuantizedLinear:
    """The layer as the method leaves it, and, if it changed it, its error measured again."""
    changed = method.finished(layer)
    if changed is layer:
        return layer
    quantizer, weight = changed.input.get_value(), changed.weight.get_value()
    error = measured_error(plan, weight.weight(quantizer.source, quantizer.part), inputs)
    return changed.changed(weight, quantizer, dataclasses.replace(changed.figures, relative_error=float(error)))
