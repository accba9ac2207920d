"""What ``--dry-run`` shows of a plan: every layer with its format and bytes, and what the conversion will take."""

from flax import nnx
from rich.table import Table

from fqjax.convert.plan import Plan, size_of
from fqjax.data.text import BATCH
from fqjax.drivers.method import Method
from fqjax.drivers.settings import Compensated
from fqjax.layers.linear import layer_bytes
from fqjax.models.sites import reading_alike
from fqjax.report.grouping import Row, grouped
from fqjax.report.report import RANGES, format_bytes, narrow_table

PROCESS_BYTES, FLOAT32_COPIES = 800e6, 6
"""Bytes of the process without a model, and copies of a layer in float32 that are there at once, from what
scripts/measure_conversion_memory.py measured."""


def plan_table(made: Plan, *, all_layers: bool = False) -> Table:
    """The plan as ``--dry-run`` prints it: every linear layer with its shape, format and estimated bytes.

    Args:
      all_layers: whether every layer has a row; otherwise, of many layers, experts and blocks that are alike share one.
    """
    scheme, linears, skipped = made.conversion.scheme, made.selection.linears, made.selection.skipped
    kinds = {0.0: "INT8", 1.0: "INT4"}
    kind = "bf16" if scheme.method is None else kinds.get(scheme.method.allocation.int4_share, "INT4 or INT8")
    kept, estimate = scheme.kept_in_int8(linears), estimated_bytes(made)
    plain = {name: 2 * size_of(linear) for name, linear in linears.items()}
    rows = []
    for name, linear in linears.items():
        stored = made.stored_bits.get(name)
        label = f"INT{stored}" if stored else "INT8" if name in kept else kind
        shape = f"{linear.out_features} x {linear.in_features}"
        rows.append(Row.of(name, (shape, label, format_bytes(plain[name]), format_bytes(estimate[name]))))
    for name in skipped:
        rows.append(Row.of(name, ("", "INT8" if scheme.head and name == "lm_head" else "float", "", "")))
    shown = rows if all_layers else grouped(rows)
    table = narrow_table(f"{made.directory} to {made.conversion.out}, scheme {scheme.name}", "")
    table.add_column("layer", overflow="fold")
    for heading in ("out x in", "format", "bf16", "estimate"):
        table.add_column(heading, justify="left" if heading == "format" else "right", no_wrap=True)
    for row in shown:
        table.add_row(row.label, *row.kind, style=None if row.kind[0] else "dim")
    sums = [format_bytes(sum(sizes.values())) for sizes in (plain, estimate, made.outer_bytes)]
    reasons = grouped([Row.of(name, (reason,)) for name, reason in skipped.items()], len(rows) if all_layers else 1)
    before = " before flattening" if scheme.method is not None and scheme.method.flattens else " after"
    lines = [
        f"Linear layers: {sums[0]} in bf16, about {sums[1]}{before}.",
        f"Embeddings, norms and head: {sums[2]}.",
        f"Memory at most: about {format_bytes(peak_memory(made))}.",
        f"Calibration: {_calibration(made)}.",
        *(f"{row.label}: {row.kind[0]}." for row in reasons),
        *([] if made.export_obstacle is None else [f"Cannot be exported: {made.export_obstacle}."]),
        *([RANGES] if len(shown) < len(rows) else []),
        *(["Not there yet:", *made.lacking] if made.lacking else []),
    ]
    table.caption = "\n".join(lines)
    return table


def _calibration(made: Plan) -> str:
    """What calibration runs on, in words."""
    windows, asked = sum(len(batch) for batch in made.batches), made.conversion
    if windows:
        fewer = f", all that the text has (asked for: {asked.samples})" if windows < asked.samples else ""
        return f"{windows} windows of {asked.window} tokens{fewer}"
    needed = asked.scheme.method is not None and not asked.data_free
    return f"{asked.samples} windows of {asked.window} tokens, once there is a tokenizer" if needed else "none"


def peak_memory(made: Plan) -> float:
    """An estimate of a conversion's peak memory on a CPU, in bytes; on a GPU a part of it is the device's.

    What is needed at once is either one of the modules outside the blocks, twice while it is read or written; or a block,
    with the rows kept of all of its layers' inputs, and either the scores of attention while a batch runs through it, or
    several copies in float32 of its largest layer, or of all experts' layers that read the same input, or with GPTQ the
    moments of its inputs and what is needed beside them.  Inputs of other batches are kept on disk.
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
    block = _largest_block({name: weights[name] + rows[name] for name in linears})
    return PROCESS_BYTES + max(outer, block + max(work, _running_bytes(made)))


def _running_bytes(made: Plan) -> float:
    """What a batch of calibration takes on its way through a block: scores of attention and their softmax, in float32."""
    if made.conversion.data_free:
        return 0
    window, (_, config) = made.conversion.window or 0, made.architecture
    windows = min(BATCH, made.conversion.samples)
    return 2 * 4 * windows * getattr(config, "num_attention_heads", 0) * window**2


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
