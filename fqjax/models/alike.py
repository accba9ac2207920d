"""Models of shapes, whose parts that are alike are made once."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar

from flax import nnx

_shapes = ContextVar("shapes", default=False)


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """While it is open no values of parameters are asked for, so that :func:`each` may copy modules.

    Making a linear layer traces how it would be initialized, some milliseconds each; copying one takes a tenth of it.
    """
    token = _shapes.set(True)
    try:
        yield
    finally:
        _shapes.reset(token)


def each(make: Callable[[int], nnx.Module], kinds: Sequence[Hashable]) -> nnx.List:
    """A list of modules, each with parameters of its own.

    Args:
      make: makes the module of an index.
      kinds: for each index, what decides its module's structure and shapes.
    """
    if not _shapes.get():
        return nnx.List([make(i) for i in range(len(kinds))])
    made = {kind: nnx.split(make(kinds.index(kind))) for kind in dict.fromkeys(kinds)}
    return nnx.List([nnx.merge(*made[kind], copy=True) for kind in kinds])
