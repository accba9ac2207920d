"""A warning of layers that quantization makes larger, as padding does to those of few channels."""

from fqjax.layers.surgery import spoken
from fqjax.report.report import Report
from fqjax.runtime.notices import say_once


def say_what_grew(report: Report) -> None:
    """Logs one warning if quantized layers take more bytes than they would in bfloat16."""
    rows = [row for row in report.layers if row.scales]
    grown = [row for row in rows if row.bytes > row.bytes_bf16]
    if not grown:
        return
    worst = max(grown, key=lambda row: row.bytes / max(row.bytes_bf16, 1))
    say_once(
        f"{len(grown)} of {len(rows)} quantized layers take more bytes than in bf16, as padding and flattening add more than "
        f"codes save: {spoken(worst.name)} takes {worst.bytes} instead of {worst.bytes_bf16}; ignore such layers to leave "
        "them in floating point"
    )
