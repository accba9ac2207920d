"""What ``--dry-run`` shows of a plan: every layer with its format and bytes, and what the conversion will take."""

from flax import nnx
from rich.table import Table

from fqjax.convert.plan import Plan, size_of
from fqjax.drivers.method import Method
from fqjax.drivers.settings import Compensated
from fqjax.layers.linear import layer_bytes
from fqjax.models.sites import reading_alike
from fqjax.report.report import format_bytes, narrow_table

PROCESS_BYTES, FLOAT32_COPIES = 800e6, 6
"""Bytes of the process without a model, and copies of a layer in float32 that are there at once, from what
scripts/measure_conversion_memory.py measured."""


def plan_table(made: Plan) -> Table:
    """The plan as ``--dry-run`` prints it: every linear layer with its shape, format and estimated bytes."""
    scheme = made.conversion.scheme
    kinds = {0.0: "INT8", 1.0: "INT4"}
    kind = "bf16" if scheme.method is None else kinds.get(scheme.method.allocation.int4_share, "INT4 or INT8")
    kept = scheme.kept_in_int8(made.selection.linears)
    table = narrow_table(f"{made.directory} to {made.conversion.out}, scheme {scheme.name}", "")
    for heading in ("layer", "out x in", "format", "bf16", "estimate"):
        table.add_column(heading, justify="left" if heading in ("layer", "format") else "right", no_wrap=True)
    plain = {name: 2 * size_of(linear) for name, linear in made.selection.linears.items()}
    estimate = estimated_bytes(made)
    for name, linear in made.selection.linears.items():
        stored = made.stored_bits.get(name)
        label = f"INT{stored}" if stored else "INT8" if name in kept else kind
        shape = f"{linear.out_features} x {linear.in_features}"
        table.add_row(name, shape, label, format_bytes(plain[name]), format_bytes(estimate[name]))
    for name in made.selection.skipped:
        table.add_row(name, "", "INT8" if scheme.head and name == "lm_head" else "float", "", "", style="dim")
    windows = sum(len(batch) for batch in made.batches)
    reasons = "".join(f"\n{name}: {reason}." for name, reason in made.selection.skipped.items())
    lacking = "".join(f"\n{line}" for line in made.lacking)
    outer = sum(made.outer_bytes.values())
    table.caption = (
        f"Linear layers: {format_bytes(sum(plain.values()))} in bf16, "
        f"about {format_bytes(sum(estimate.values()))} before flattening.\n"
        f"Embeddings, norms and head: {format_bytes(outer)}.\n"
        f"Memory at most: about {format_bytes(peak_memory(made))}.\n"
        f"Calibration: {f'{windows} windows of {made.conversion.window} tokens' if windows else 'none'}.{reasons}"
        + ("" if made.export_obstacle is None else f"\nCannot be exported: {made.export_obstacle}.")
        + (f"\nNot there yet:{lacking}" if lacking else "")
    )
    return table


def peak_memory(made: Plan) -> float:
    """An estimate of a conversion's peak memory on a CPU, in bytes; on a GPU a part of it is the device's.

    What is needed at once is either one of the modules outside the blocks, twice while it is read or written; or a block,
    with the rows kept of all of its layers' inputs, and several copies in float32 of its largest layer, or of all experts'
    layers that read the same input, or with GPTQ the moments of its inputs and what is needed beside them.
    """
    scheme, linears = made.conversion.scheme, made.selection.linears
    outer = 2 * max(made.outer_bytes.values(), default=0)
    weights = {name: 2 * size_of(linear) for name, linear in linears.items()}
    if scheme.method is None:
        return PROCESS_BYTES + max(outer, 3 * _largest_block(weights))
    rows = {name: 4 * scheme.sample_rows * linear.in_features for name, linear in linears.items()}
    largest, together = max(size_of(linear) for linear in linears.values()), scheme.method.shares_inputs
    alike = reading_alike(made.sites, linears) if together else [(name,) for name in linears]
    work = 4 * FLOAT32_COPIES * max(sum(size_of(linears[name]) for name in names) for names in alike)
    if isinstance(scheme.method.rounding, Compensated):
        moments = {name: 8 * linear.in_features**2 for name, linear in linears.items()}
        # While they are summed up, codes of 16 bits and two weights in float32; then as much again as the largest take.
        besides = max(_largest_block(weights) + 8 * largest, max(moments.values()))
        work = max(work, _largest_block(moments) + besides)
    return PROCESS_BYTES + max(outer, _largest_block({name: weights[name] + rows[name] for name in linears}) + work)


def _largest_block(sizes: dict[str, int]) -> int:
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        block = ".".join(name.split(".")[:2])
        blocks[block] = blocks.get(block, 0) + size
    return max(blocks.values())


def estimated_bytes(made: Plan) -> dict[str, float]:
    """Estimated bytes of each layer, by dotted path, before flattening; where bits are still to be chosen, on average."""
    scheme = made.conversion.scheme
    kept = scheme.kept_in_int8(made.selection.linears)
    found: dict[str, float] = {}
    for name, linear in made.selection.linears.items():
        if scheme.method is None:
            found[name] = 2 * size_of(linear) * made.stored_bits.get(name, 16) / 16
        else:
            share = 0.0 if name in kept else scheme.method.allocation.int4_share
            found[name] = share * _bytes(linear, scheme.method, 4) + (1 - share) * _bytes(linear, scheme.method, 8)
    return found


def _bytes(linear: nnx.Linear, method: Method, bits: int) -> int:
    form, quantizer = method.formats(bits)
    return layer_bytes(linear, form, quantizer, form.padded(linear.in_features))
