"""Conversion of a Hugging Face checkpoint into a quantized Orbax directory, as ``fqjax convert`` does it.

Everything that can be wrong with the input is looked for first: the plan is made from headers and configurations alone,
before a weight is read (:mod:`fqjax.convert.plan`).  One block of the model at a time is then in memory: read from the
shards, calibrated on what the block before gave, quantized, written, dropped.  The work goes on in ``OUT.partial``
(:mod:`fqjax.convert.staging`), which remembers each finished step; the directory OUT appears at the end, complete, by
one rename. A conversion may be killed at any moment; ``--resume`` goes on from there.
"""

import functools
import time
from pathlib import Path

from flax import nnx

from fqjax.checkpoint.calibration_record import CalibrationRecord, read_calibration_record
from fqjax.checkpoint.orbax.read import load_abstract
from fqjax.checkpoint.orbax.write import Writer, refuse_existing
from fqjax.convert.plan import Conversion, Plan, plan
from fqjax.convert.preview import plan_table
from fqjax.convert.staging import claimed, finish, is_complete, publish, remove, staging_directory
from fqjax.convert.streamed import StreamedModel
from fqjax.drivers.pipeline import quantize_blocks
from fqjax.drivers.store import DirectoryStore
from fqjax.layers.head import with_int8_head
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.surgery import replace_modules
from fqjax.report.growth import say_what_grew
from fqjax.report.report import Report, report_of
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import CannotWrite
from fqjax.runtime.memory import giving_back
from fqjax.runtime.progress import track

__all__ = ["Conversion", "Plan", "convert", "plan", "plan_table", "staging_directory"]


def convert(made: Plan, *, resume: bool = False) -> Report:
    """Carries a plan out.

    Args:
      made: what :func:`plan` returned.
      resume: go on with a conversion that was interrupted.

    Returns:
      The report on the converted model; the directory is written.

    Raises:
      InputError: if a weight or an activation is not finite, a layer could overflow, a shard changes meanwhile or has
        changed since the conversion was begun, or an unfinished conversion stands in the way; nothing remains then, unless
        ``resume`` was asked for.  Also if something cannot be written, as on a full disk; then the conversion can be
        resumed.  What cannot be removed when all is done is a warning: the directory is complete.
    """
    start, out = time.perf_counter(), made.conversion.out
    complete = resume and is_complete(out)  # Looked at before anything is written into the staging directory.
    with claimed(out, made.fingerprint, resume) as staging, giving_back():
        try:
            if complete:
                model, record = load_abstract(out), read_calibration_record(out)
            else:
                refuse_existing(out)
                model, record = _carry_out(made, staging)
        except CannotWrite as error:
            raise CannotWrite(f"{error}; what was done so far can be taken up with --resume") from None
        except InputError:
            if not resume:
                remove(staging)
            raise
        finish(out, remove(staging))
    report = report_of(model, time.perf_counter() - start, record, made.selection.skipped)
    say_what_grew(report)
    return report


def _carry_out(made: Plan, staging: Path) -> tuple[nnx.Module, CalibrationRecord | None]:
    """Converts; returns the model with shapes in place of arrays."""
    scheme = made.conversion.scheme
    store, record = DirectoryStore(staging), None
    equalized = scheme.method is not None and scheme.method.equalize
    source = StreamedModel(made.directory, *made.architecture, equalized=equalized, seen=store)
    source.check_seen()
    if scheme.method is not None:
        batches = None if made.conversion.data_free else made.batches
        record = quantize_blocks(
            store, source.chain(), made.selection.linears, scheme, batches, functools.partial(_keep, store)
        )
    finished = staging / "checkpoint"
    writer = Writer(finished, source.skeleton)
    blocks = source.chain().blocks
    quantizes = scheme.method is not None
    for path in track(list(blocks), "writing"):
        names = [name for name in made.selection.linears if quantizes and name.startswith(f"{path}.")]
        layers = {name.removeprefix(f"{path}."): QuantizedLinear(**store["finished", name]) for name in names}
        writer.add(path, replace_modules(blocks[path], layers))  # No name holds the block while the next one is read.
        del layers
    for name in source.outer:
        writer.add(name, _outer_module(source, name, int8_head=scheme.head == "int8"))
    source.check_unchanged()
    model = writer.finish(made.tokenizer, record)
    publish(finished, made.conversion.out, made.fingerprint)
    return model, record


def _keep(store: DirectoryStore, layers: dict[str, QuantizedLinear]) -> None:
    for name, layer in layers.items():
        store["finished", name] = layer.parts()


def _outer_module(source: StreamedModel, name: str, *, int8_head: bool) -> nnx.Module:
    module = source.outer_module(name)
    if int8_head and name == source.skeleton.head_name:
        return getattr(with_int8_head(replace_modules(source.skeleton, {name: module})), name)
    return module
