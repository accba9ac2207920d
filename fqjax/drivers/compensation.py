"""Rounds the weight of one layer so that it makes up for the errors in its input, from the moments of that input.

The weight that makes the best of the quantized input is (G + d)^-1 (C + d) W (:func:`fqjax.core.rounding.gptq.aim_of`); it is
rounded by GPTQ with G as its Hessian.  G and C are those of :mod:`fqjax.drivers.moments`.
"""

import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Float32, Int

from fqjax.core.formats.base import Grid
from fqjax.core.layer import LayerPlan
from fqjax.core.rounding.gptq import (
    Factored,
    Prepared,
    aim_of,
    aim_of_more,
    factorize,
    gptq_prepared,
    invert,
    solve_ridge,
)
from fqjax.core.transforms.base import Transform
from fqjax.runtime.compiling import jit

DAMPING_RAISES = 3
"""How often ten times the damping is tried where the damped moments have no Cholesky factor."""


class Moments(NamedTuple):
    """G and C, (K, K), of smoothed inputs; C is None where the weight is left where it is."""

    gram: Float32[Array, "k k"]
    cross: Float32[Array, "k k"] | None


def rounded_weight(weight: Float[Array, "n k"], plan: LayerPlan, moments: Moments, damping: float) -> Int[Array, "n k"]:
    """The weight that makes up for the errors in its input, rounded so that it makes up for its own.

    The moments are used up.  It goes step by step, so that no more arrays of their size are there at once than must be.
    Where they have no Cholesky factor whatever the damping, the codes are those of NaN
    (:data:`fqjax.core.codes.NO_CODE`).
    """
    target = _transformed(weight, plan.transform)
    if moments.cross is not None:
        aim = jax.block_until_ready(_aim_of(target, *moments, damping=damping))
        moments.cross.delete()
        target = _solved(moments.gram, aim, target, damping)
        del aim
    factored = _factored(moments.gram, damping)
    moments.gram.delete()
    prepared = jax.block_until_ready(_invert(factored))
    return jax.block_until_ready(_round_in_order(target, plan.grid, prepared))


def _solved(
    gram: Float32[Array, "k k"], aim: Float32[Array, "k n"], weight: Float32[Array, "n k"], least: float
) -> Float32[Array, "n k"]:
    """The weight that ``aim`` asks for, with the least damping with which there is one."""
    found, finite = _solve_ridge(gram, aim, damping=least)
    for damping in _more(least):
        if bool(finite):
            break
        more = _aim_of_more(aim, weight, gram, damping=damping, before=least)
        found, finite = _solve_ridge(gram, more, damping=damping)
    return found


def _factored(gram: Float32[Array, "k k"], least: float) -> Factored:
    """The Cholesky factor with the least damping with which there is one."""
    found = _factorize(gram, damping=least)
    for damping in _more(least):
        if bool(found.finite):
            break
        found = _factorize(gram, damping=damping)
    return found


def _more(damping: float) -> list[float]:
    """Dampings to try after one that was not enough."""
    return [damping * 10**i for i in range(1, DAMPING_RAISES + 1)]


_aim_of = functools.partial(jit, static_argnames="damping")(aim_of)
_aim_of_more = functools.partial(jit, static_argnames=("damping", "before"))(aim_of_more)
_solve_ridge = functools.partial(jit, static_argnames="damping")(solve_ridge)
_factorize = functools.partial(jit, static_argnames="damping")(functools.partial(factorize, act_order=True))
_invert = jit(invert, donate_argnums=0)


@jax.jit
def _transformed(weight: Float[Array, "n k"], transform: Transform) -> Float32[Array, "n k"]:
    return transform.weight(weight)


@jit
def _round_in_order(target: Float32[Array, "n k"], grid: Grid, prepared: Prepared) -> Int[Array, "n k"]:
    return grid.round(gptq_prepared(target, prepared, grid.column))
