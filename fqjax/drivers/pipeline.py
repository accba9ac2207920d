"""Quantization of a model's linear layers: the passes of a scheme's method, one after the other."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.drivers.allocate import Allocate
from fqjax.drivers.base import Keep, Pass, Run, execute
from fqjax.drivers.calibrate import Calibrate
from fqjax.drivers.rounding import RoundCompensated, RoundNearest
from fqjax.drivers.store import Store
from fqjax.drivers.trial import Trial
from fqjax.models.chain import Chain
from fqjax.scheme import Scheme


def passes_of(scheme: Scheme) -> list[Pass]:
    """The passes that a scheme takes."""
    last = RoundCompensated() if scheme.rounding == "gptq" else RoundNearest()
    return [Calibrate(), Trial(), Allocate(), last]


def quantize_blocks(
    store: Store,
    chain: Chain,
    linears: Mapping[str, nnx.Linear],
    scheme: Scheme,
    calibration: Iterable[Any],
    keep: Keep,
) -> CalibrationRecord:
    """Quantize a model's linear layers.

    Args:
      store, chain, linears, scheme, calibration, keep: as :class:`fqjax.drivers.base.Run` takes them.

    Raises:
      InputError: as :func:`fqjax.quantize` does.
    """
    passes = passes_of(scheme)
    repeats = sum(one.visits and one.inputs != "none" and one.batches is None for one in passes) > 1
    run = Run(store, chain, linears, scheme, calibration, keep, repeats=repeats)
    # On a GPU, float32 would else be multiplied with 10 bits of mantissa.
    with jax.default_matmul_precision("float32"):
        execute(run, passes)
    return CalibrationRecord({name: run.span(name).absmax for name in linears}, store["costs",])
