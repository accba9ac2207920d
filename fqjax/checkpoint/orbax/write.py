"""Saving models: whole, or part by part while they are converted.

Empty arrays are left out: loading makes them from the manifest.  The manifest is written last, with the checksums of all
others.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import jax
from flax import nnx
from orbax.checkpoint import v1 as ocp

from fqjax.checkpoint.calibration_record import CALIBRATION_FILE, CalibrationRecord
from fqjax.checkpoint.checksums import checksums, file_checksums, with_sums
from fqjax.checkpoint.manifest import MANIFEST_FILE, describe
from fqjax.checkpoint.target import check_target, new_directory, saving
from fqjax.checkpoint.tokenizer import TOKENIZER_FOLDER, check_writable
from fqjax.checkpoint.tree import named_leaves, nest, split_storable
from fqjax.layers.head import Int8Table
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import abstracted
from fqjax.layers.stacked import quantized_layers, unstacked
from fqjax.layers.surgery import replace_modules
from fqjax.models.checks import check_model
from fqjax.runtime.arguments import check_path, shown
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, check_new, exists, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HasCalibration(Protocol):
    """A report (:class:`fqjax.report.report.Report`)."""

    @property
    def calibration(self) -> CalibrationRecord | None:
        """Findings of calibration; None where they are not known."""
        ...


def save(
    path: str | Path,
    model: nnx.Module,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    report: HasCalibration | None = None,
) -> None:
    """Saves a model, quantized or not.

    Args:
      path: directory to write; it must not exist, and appears only when complete.
      model: any NNX module.
      tokenizer: a transformers tokenizer to store beside it.
      report: what :func:`fqjax.quantize` gave besides; with it, ``fqjax inspect --plot`` can show what calibration saw.

    Raises:
      InputError: if ``path`` exists or cannot be written, or other processes hold a part of an array.
    """
    path = check_path("path", path)
    check_model(model)
    check_writable(tokenizer)
    record = None if report is None else getattr(report, "calibration", report)
    if record is not None and not isinstance(record, CalibrationRecord):
        raise InputError(f"report {shown(report)}: expected the report that fqjax.quantize gave besides the model")
    refuse_existing(path)
    with new_directory(Path(os.path.realpath(path))) as staging:
        write(staging, model, tokenizer, record)


def write(
    directory: Path, model: nnx.Module, tokenizer: "PreTrainedTokenizerBase | None", record: CalibrationRecord | None
) -> None:
    """Writes a checkpoint into a directory that does not exist yet."""
    model = unstacked(model)
    _, stored, _ = split_storable(model)
    leaves = _arrays_to_store(stored)
    manifest, sums = describe(model), checksums(leaves)
    with saving(directory):
        ocp.save(str(directory), nest(leaves))
        _write_beside(directory, tokenizer, record, manifest, sums)


class Writer:
    """Writes a checkpoint part by part; nothing is held of a part that was written but its shapes.

    Args:
      directory: that does not exist yet, and appears with :meth:`finish`; what an earlier attempt left is removed.
      skeleton: the model before quantization, with shapes in place of arrays.

    Raises:
      CannotWrite: from every method.
    """

    def __init__(self, directory: Path, skeleton: nnx.Module):
        self.directory, self.skeleton = Path(os.path.realpath(directory)), skeleton
        self.sums: dict[str, str] = {}
        self.replaced: dict[str, nnx.Module] = {}
        for old in (self.directory, *self.directory.parent.glob(f"{self.directory.name}.*")):
            if exists(old):
                with writing(old):
                    shutil.rmtree(old)

    def add(self, path: str, module: nnx.Module) -> None:
        """Writes the module with a dotted path, of which nothing has been written yet."""
        _, stored, _ = split_storable(module)
        leaves = _arrays_to_store(stored, tuple(path.split(".")))
        self.sums |= checksums(leaves)
        if leaves:
            with saving(self.directory):
                ocp.partial.save(str(self.directory), nest(leaves))
        if isinstance(module, QuantizedLinear | Int8Table):
            self.replaced[path] = abstracted(module)
        for name, layer in quantized_layers(module).items():
            if name:
                self.replaced[f"{path}.{name}"] = abstracted(layer)

    def finish(self, tokenizer: "PreTrainedTokenizerBase | None", record: CalibrationRecord | None) -> nnx.Module:
        """Writes what goes beside the arrays.

        Returns:
          The model that was written, with shapes in place of arrays.
        """
        model = replace_modules(self.skeleton, self.replaced)
        with saving(self.directory):
            ocp.partial.finalize(str(self.directory))
            _write_beside(self.directory, tokenizer, record, describe(model), self.sums)
        return model


def _arrays_to_store(state: nnx.State, start: tuple[str, ...] = ()) -> dict[tuple[str, ...], jax.Array]:
    """The arrays of a state by path from ``start`` on, but for empty ones, which loading makes from the manifest."""
    leaves = cast(dict[tuple[str, ...], jax.Array], named_leaves(state))  # No abstract model is written.
    return {(*start, *name): leaf for name, leaf in leaves.items() if leaf.size}


def _write_beside(
    directory: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    record: CalibrationRecord | None,
    manifest: JsonObject,
    sums: dict[str, str],
) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(directory / TOKENIZER_FOLDER)
    if record is not None:
        record.write(directory)
    beside = [*(directory / TOKENIZER_FOLDER).rglob("*"), directory / CALIBRATION_FILE]
    manifest = with_sums(manifest, sums, file_checksums(directory, beside))
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def refuse_existing(path: Path) -> None:
    """Raises an InputError if the path exists, or is none that can be written and read again."""
    check_target(path)
    check_new(path)
