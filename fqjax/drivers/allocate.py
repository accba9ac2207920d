"""The choice of one option for every layer, once all of them are known."""

from collections.abc import Iterable, Mapping

import jax
from flax import nnx

from fqjax.drivers.assemble import count_macs
from fqjax.drivers.base import Pass, Run
from fqjax.drivers.candidates import costs_by_bits, select
from fqjax.drivers.ties import Units, choices


class Allocate(Pass):
    """Chooses by the method's allocation, for all layers of a unit alike.

    Keeps ``("macs",)``, ``("chosen",)`` with the number of each layer's option, ``("widths",)`` with K', to which the layers
    of a unit are padded, and ``("costs",)``: by the bits of its weight, what a layer costs the model.
    """

    name, title, visits = "allocated", "choosing", False

    def begin(self, run: Run) -> None:
        store, units = run.store, run.units
        layer_macs = count_macs(run.linears, {name: run.span(name) for name in run.linears})
        outlines = {name: store["outlines", name] for name in run.linears}
        choosing = {
            unit: choices({name: outlines[name] for name in names}, layer_macs) for unit, names in units.items()
        }
        options = {unit: [choice.outline for choice in some] for unit, some in choosing.items()}
        macs = {unit: sum(layer_macs[name] for name in names) for unit, names in units.items()}
        costs = store["sensitivities",] if ("sensitivities",) in store else {}
        picked = select(options, macs, _bytes_in_bf16(run.linears.values()), run.method.allocation, lambda: costs)
        chosen: dict[str, int] = {}
        widths: dict[str, int] = {}
        for unit, option in picked.items():
            of_layers = choosing[unit][options[unit].index(option)].options
            chosen |= of_layers
            width = max(outlines[name][i].width for name, i in of_layers.items())
            widths |= {name: width for name in of_layers}
        by_unit = costs_by_bits(options, picked, costs) if costs else {}
        store["macs",], store["chosen",], store["widths",] = layer_macs, chosen, widths
        store["costs",] = _of_layers(units, by_unit, layer_macs)


def _of_layers(
    units: Units, costs: Mapping[str, Mapping[int, float]], macs: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """The costs of units as costs of their layers, in proportion to the multiply-accumulates."""
    found = {}
    for unit, cost in costs.items():
        whole = sum(macs[name] for name in units[unit])
        for name in units[unit]:
            share = macs[name] / whole if whole else 1 / len(units[unit])
            found[name] = {bits: share * value for bits, value in cost.items()}
    return found


def _bytes_in_bf16(linears: Iterable[nnx.Linear]) -> int:
    parameters = jax.tree.leaves([nnx.state(linear, nnx.Param) for linear in linears])
    return 2 * sum(leaf.size for leaf in parameters)
