"""Reports on quantized models, layer by layer: bits, K'/K, error, bytes, overflow margin."""

import dataclasses
import math
from collections.abc import Mapping

from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.core.overflow import LIMIT
from fqjax.core.table import bytes_of
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.modules import check_module
from fqjax.layers.record import Record, abstracted
from fqjax.layers.stacked import quantized_layers, unstacked
from fqjax.layers.summary import scheme_name
from fqjax.layers.surgery import dotted, left_in_float, select_linears
from fqjax.report.grouping import Figure, Row, grouped
from fqjax.report.rendering import as_html, as_text
from fqjax.runtime.arguments import check_number, check_type
from fqjax.runtime.files import JsonObject

RANGES = "Layers alike share a row: numbers of blocks and experts as first-last, figures as lowest to highest."


NOT_CHOSEN = "left out when the model was quantized"
"""Why a layer is in floating point, where no more is known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One linear layer.

    Attributes:
      name: dotted path in the model.
      bits: 4 or 8, or 16 for a layer in bfloat16 and 32 in float32.
      expansion: K'/K, flattened channels over original ones, before padding.
      relative_error: mean squared error of the output over its mean square, on calibration data, or without any for inputs
        whose channels are alike and independent; 0 in floating point, and for layers read from another program's
        checkpoint, of which it is not known.
      bytes: on the device: codes (with their padding), scales, the input's recipe, bias.
      bytes_bf16: weight and bias in bfloat16.
      macs: multiply-accumulates of the unquantized layer for one token.
      accumulator_bound: largest magnitude the int32 accumulator can reach; 0 in floating point.
      scales: what has a scale of its own: "tensor", "channel", or "group of 128", "group of 128, integer", "group of 128,
        folded"; "" in floating point.
      silent_channels: input channels that were zero in all of calibration, and are quantized like the others; None where
        that is not known.
    """

    name: str
    bits: int
    expansion: float
    relative_error: float
    bytes: int
    bytes_bf16: int
    macs: int
    accumulator_bound: int
    scales: str = ""
    silent_channels: int | None = dataclasses.field(default=None, compare=False)

    @property
    def overflow_margin_bits(self) -> float:
        """Bits between the accumulator's bound and 2**31; infinite in floating point."""
        return math.log2(LIMIT / self.accumulator_bound) if self.accumulator_bound else math.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A model's linear layers, and totals over them.

    Attributes:
      scheme: name of the scheme; "none" for a model in floating point.
      layers: one :class:`LayerReport` a linear layer, in the model's order.
      skipped: what has a matrix of weights and is left in floating point, by dotted path, each with the reason: linear
        layers of a quantized model, those in ``layers`` too; embeddings; layers of other kinds.
      model_bytes: all arrays of the model, on the device.
      seconds: time that calibration and quantization took; 0 where nothing was timed.
      calibration: what calibration found out; None where it is not known.
    """

    scheme: str
    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    model_bytes: int
    seconds: float = 0.0
    calibration: CalibrationRecord | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def int4_mac_share(self) -> float:
        """Share of the linear layers' multiply-accumulates computed on 4-bit weights."""
        return ratio(sum(row.macs for row in self.layers if row.bits == 4), sum(row.macs for row in self.layers))

    @property
    def int4_layer_share(self) -> float:
        """Share of the linear layers whose weights have 4 bits."""
        return ratio(sum(row.bits == 4 for row in self.layers), len(self.layers))

    @property
    def expansion(self) -> float:
        """K'/K, averaged over multiply-accumulates."""
        return ratio(sum(row.expansion * row.macs for row in self.layers), sum(row.macs for row in self.layers))

    @property
    def bytes(self) -> int:
        """Bytes of the linear layers on the device."""
        return sum(row.bytes for row in self.layers)

    @property
    def bytes_bf16(self) -> int:
        """Bytes of the same layers in bfloat16."""
        return sum(row.bytes_bf16 for row in self.layers)

    @property
    def model_bytes_bf16(self) -> int:
        """Bytes of the whole model with its linear layers in bfloat16."""
        return self.model_bytes - self.bytes + self.bytes_bf16

    @property
    def trade_off(self) -> list[tuple[float, float]]:
        """(share of INT4, sum of the layers' costs), layer by layer; see :meth:`CalibrationRecord.trade_off`."""
        if self.calibration is None:
            return []
        return self.calibration.trade_off({row.name: row.macs for row in self.layers})

    def to_json(self) -> JsonObject:
        """The report as ``fqjax inspect --json`` writes it."""
        return {
            "scheme": self.scheme,
            "layers": [
                dataclasses.asdict(row) | {"overflow_margin_bits": round(row.overflow_margin_bits, 2)}
                if row.accumulator_bound
                else dataclasses.asdict(row) | {"overflow_margin_bits": None}
                for row in self.layers
            ],
            "skipped": self.skipped,
            "int4_mac_share": self.int4_mac_share,
            "int4_layer_share": self.int4_layer_share,
            "expansion": self.expansion,
            "bytes": self.bytes,
            "bytes_bf16": self.bytes_bf16,
            "model_bytes": self.model_bytes,
            "model_bytes_bf16": self.model_bytes_bf16,
            "trade_off": self.trade_off,
        }

    def __str__(self) -> str:
        """:meth:`table` as plain text, nothing of it cut."""
        return as_text(self.table())

    def _repr_html_(self) -> str:
        """:meth:`table` for notebooks."""
        return as_html(self.table())

    def table(self, *, all_layers: bool = False) -> Table:
        """The report as a table for the terminal.

        Args:
          all_layers: whether every layer has a row; otherwise, of many layers, experts and blocks that are alike share one.
        """
        title = "not quantized" if self.scheme == "none" else f"scheme: {self.scheme}"
        groups = any(row.scales.startswith("group") for row in self.layers)
        rows = [_row(row, groups) for row in self.layers]
        listed = {row.name for row in self.layers}
        rows += [Row.of(name, ("float", *["-"] * 5)) for name in self.skipped if name not in listed]
        shown = rows if all_layers else grouped(rows)
        table = narrow_table(title, self.totals() + (f"\n{RANGES}" if len(shown) < len(rows) else ""))
        table.add_column("layer", overflow="fold")
        for heading in ("bits", "scales" if groups else "K'/K", "error", "bytes", "of bf16", "margin"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in shown:
            cells = (*row.kind, *(figure.text for figure in row.figures))
            table.add_row(row.label, *cells, style="dim" if cells[0] == "float" else None)
        return table

    def totals(self) -> str:
        """Some lines on the whole."""
        grouped = [row for row in self.layers if row.scales.startswith("group")]
        floats = sum("," not in row.scales for row in grouped)
        second = f"K'/K: {self.expansion:.3f} on average."
        if grouped:
            second = f"Float group scales: {floats} of {len(grouped)} layers."
        return (
            f"INT4: {self.int4_mac_share:.2%} of the multiply-accumulates.  {second}\n"
            f"Linear layers: {format_bytes(self.bytes)}, {_compared(self.bytes, self.bytes_bf16)}.  "
            f"Whole model: {format_bytes(self.model_bytes)}.\n"
            f"{self._silence()}"
            "error: mean square, of the layer's output.  margin: bits before int32 overflows."
        )

    def _silence(self) -> str:
        """A line on the channels that calibration never excited; empty if there are none."""
        silent = [row.silent_channels for row in self.layers if row.silent_channels]
        return f"Zero in all of calibration: {sum(silent)} input channels of {len(silent)} layers.\n" if silent else ""


def report_of(
    model: nnx.Module,
    seconds: float = 0.0,
    record: CalibrationRecord | None = None,
    skipped: Mapping[str, str] | None = None,
) -> Report:
    """Reports on a model's linear layers as they are, quantized or not.

    Args:
      model: any NNX module.
      seconds: time that calibration and quantization took.
      record: what calibration found out.
      skipped: reasons why layers were left in floating point, by dotted path, that the model itself does not tell, such as
        patterns that were to be ignored; None where they are not known.

    Raises:
      InputError: naming the argument that is none.
    """
    seconds = check_number("seconds", seconds)
    if record is not None:
        check_type("record", record, CalibrationRecord, "a CalibrationRecord")
    if skipped is not None:
        check_type("skipped", skipped, Mapping, "reasons by name")
    model = unstacked(abstracted(check_module(model)))
    quantized = quantized_layers(model)
    rows = [_quantized_row(name, layer, record) for name, layer in quantized.items()]
    selection = select_linears(model, required=False)
    rows += [_float_row(name, linear) for name, linear in selection.linears.items()]
    reasons = left_in_float(model) | selection.skipped
    if quantized:
        reasons |= dict.fromkeys(selection.linears, NOT_CHOSEN)
    reasons |= {name: why for name, why in (skipped or {}).items() if name in reasons}
    order = {dotted(path): i for i, (path, _) in enumerate(nnx.iter_graph(model))}
    rows.sort(key=lambda row: order[row.name])
    return Report(
        scheme=", ".join(dict.fromkeys(scheme_name(layer.recipe) for layer in quantized.values())) or "none",
        layers=tuple(rows),
        skipped={name: reasons[name] for name in sorted(reasons, key=order.__getitem__)},
        model_bytes=bytes_of(nnx.state(model, nnx.Not(Record))),
        seconds=seconds,
        calibration=record,
    )


def narrow_table(title: str, caption: str) -> Table:
    """A table without a frame, which leaves the most of 80 columns to its content."""
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )


def format_bytes(count: float) -> str:
    """Bytes in the unit a person would use (1 MB = 10**6 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _quantized_row(name: str, layer: QuantizedLinear, record: CalibrationRecord | None) -> LayerReport:
    sizes, figures = layer.sizes, layer.figures
    silent = record.silent_channels(name) if record is not None and name in record.activations else None
    return LayerReport(
        name=name,
        bits=layer.bits,
        expansion=layer.expansion,
        relative_error=figures.relative_error,
        bytes=layer.nbytes,
        bytes_bf16=2 * (sizes.outputs * sizes.inputs + (sizes.outputs if layer.bias is not None else 0)),
        macs=figures.macs,
        accumulator_bound=figures.accumulator_bound,
        scales=layer.weight.get_value().format.label,
        silent_channels=silent,
    )


def _row(layer: LayerReport, groups: bool) -> Row:
    """A layer's cells; ``groups``: whether the third says what has a scale of its own."""
    error, margin = layer.relative_error, layer.overflow_margin_bits
    figures = (
        Figure.of(error, f"{error:.2%}" if error else "-"),
        Figure.of(layer.bytes, format_bytes(layer.bytes)),
        Figure.of(layer.bytes, f"{ratio(layer.bytes, layer.bytes_bf16):.0%}"),
        Figure.of(margin, f"{margin:.1f}" if layer.accumulator_bound else "-"),
    )
    if groups:
        return Row.of(layer.name, (str(layer.bits), _short(layer.scales)), figures)
    return Row.of(layer.name, (str(layer.bits),), (Figure.of(layer.expansion, f"{layer.expansion:.3f}"), *figures))


def _compared(count: float, bf16: float) -> str:
    """Bytes beside those in bfloat16, in words."""
    if abs(count - bf16) <= 0.005 * bf16:
        return "as in bf16"
    return (
        f"{bf16 / count:.2f} x less than in bf16" if count < bf16 else f"{ratio(count, bf16):.2f} x as much as in bf16"
    )


def _short(scales: str) -> str:
    """``LayerReport.scales`` in few letters."""
    return scales.removeprefix("group of ").replace(", integer", " int").replace(", folded", " fold")


def _float_row(name: str, linear: nnx.Linear) -> LayerReport:
    kernel = linear.kernel.get_value()
    size = kernel.size + (linear.bias.get_value().size if linear.bias is not None else 0)
    return LayerReport(
        name=name,
        bits=8 * kernel.dtype.itemsize,
        expansion=1.0,
        relative_error=0.0,
        bytes=size * kernel.dtype.itemsize,
        bytes_bf16=2 * size,
        macs=linear.in_features * linear.out_features,
        accumulator_bound=0,
    )


def ratio(part: float, whole: float) -> float:
    """A share; 0 of nothing."""
    return part / whole if whole else 0.0
