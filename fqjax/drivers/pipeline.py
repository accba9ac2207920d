"""Quantization of a model's linear layers: the passes of a method, one after the other."""

from collections.abc import Iterable, Mapping
from typing import cast

import jax
from flax import nnx

from fqjax.checkpoint.calibration_record import CalibrationRecord
from fqjax.drivers.allocate import Allocate
from fqjax.drivers.assume import Assume
from fqjax.drivers.base import Keep, Pass, Request, Run, execute
from fqjax.drivers.calibrate import Calibrate
from fqjax.drivers.flow import Batch
from fqjax.drivers.method import Method
from fqjax.drivers.rounding import RoundCompensated, RoundNearest
from fqjax.drivers.settings import Compensated
from fqjax.drivers.store import Store
from fqjax.drivers.trial import Trial
from fqjax.models.chain import Chain


def usual_passes(method: Method, *, data_free: bool = False) -> list[Pass]:
    """The passes of a method that has none of its own: calibrate, try what the choice of bits needs, choose, round.

    Args:
      method: with its settings.
      data_free: whether there is no data, so that the model is not run.
    """
    if data_free:
        return [Assume(), Allocate(), RoundNearest()]
    rounding = method.rounding
    last = RoundCompensated(rounding) if isinstance(rounding, Compensated) else RoundNearest()
    return [Calibrate(), Trial(), Allocate(), last]


def quantize_blocks(
    store: Store,
    chain: Chain,
    linears: Mapping[str, nnx.Linear],
    request: Request,
    calibration: Iterable[Batch] | None,
    keep: Keep,
) -> CalibrationRecord | None:
    """Quantize a model's linear layers.

    Args:
      store, chain, linears, request, calibration, keep: as :class:`fqjax.drivers.base.Run` takes them; without calibration
        data, the method is one that is ``data_free``.

    Returns:
      What calibration found out; None without data.

    Raises:
      InputError: as :func:`fqjax.quantize` does.
    """
    assert request.method is not None
    own, data_free = request.method.passes(), calibration is None
    passes = usual_passes(request.method, data_free=data_free) if own is None else cast("list[Pass]", list(own))
    repeats = sum(one.visits and one.inputs != "none" and one.batches is None for one in passes) > 1
    run = Run(store, chain, linears, request, calibration, keep, repeats=repeats)
    # On a GPU, float32 would else be multiplied with 10 bits of mantissa.
    with jax.default_matmul_precision("float32"):
        execute(run, passes)
    if data_free:
        return None
    costs = store["costs",] if ("costs",) in store else {}
    return CalibrationRecord({name: run.span(name).absmax for name in linears}, costs)
