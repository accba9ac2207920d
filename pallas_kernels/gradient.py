"""Functions of integer codes, which have no gradient."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def without_gradient(name: str, f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``f``, which raises ``NotImplementedError`` with its ``name`` when it is differentiated."""
    closed = jax.custom_jvp(f)

    @closed.defjvp
    def _(primals: tuple[object, ...], tangents: tuple[object, ...]) -> tuple[Result, Result]:
        del primals, tangents
        raise NotImplementedError(
            f"{name} cannot be differentiated: it works on integer codes; differentiate the unquantized model, or stop the "
            "gradient before it with jax.lax.stop_gradient"
        )

    return closed
