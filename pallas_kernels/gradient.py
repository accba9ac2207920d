"""Gradients: functions of integer codes have none; others have that of the reference."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


CODES = "it works on integer codes"


def without_gradient(name: str, f: Callable[Arguments, Result], why: str = CODES) -> Callable[Arguments, Result]:
    """``f``, which raises ``NotImplementedError`` with its ``name`` and the reason when it is differentiated."""
    closed = jax.custom_jvp(f)

    @closed.defjvp
    def _(primals: tuple[object, ...], tangents: tuple[object, ...]) -> tuple[Result, Result]:
        del primals, tangents
        raise NotImplementedError(
            f"{name} cannot be differentiated: {why}; differentiate the unquantized model, or stop the "
            "gradient before it with jax.lax.stop_gradient"
        )

    return closed


def with_gradient_of(reference: Callable[..., Result], f: Callable[..., Result]) -> Callable[..., Result]:
    """``f``, which is differentiated as if it were another function that computes the same in ``jax.numpy``.

    Args:
      reference: what JAX can differentiate.
      f: what runs.
    """
    closed = jax.custom_jvp(f)

    @closed.defjvp
    def _(primals: tuple[object, ...], tangents: tuple[object, ...]) -> tuple[Result, Result]:
        _, tangent = jax.jvp(reference, primals, tangents)
        return f(*primals), tangent

    return closed
