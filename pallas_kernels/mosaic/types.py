"""Types of the values in kernels, which Pallas has no public names for; importing them imports no backend."""

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

Scalar = int | jax.Array
"""A number in a kernel, known when it is traced or when it runs."""


class Views(Protocol):
    """``ref.at``: parts of the memory that a reference points to."""

    def __getitem__(self, index: object, /) -> "Ref": ...


class Ref(Protocol):
    """Reference in a kernel: to an array in device memory, shared memory or registers, or to barriers."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def at(self) -> Views: ...

    @property
    def T(self) -> "Ref": ...

    def __getitem__(self, index: object, /) -> jax.Array: ...

    def __setitem__(self, index: object, value: jax.Array, /) -> None: ...


class Scratch(Protocol):
    """Memory or barriers that a kernel asks for: ``plgpu.SMEM(...)``, ``plgpu.Barrier(...)``."""

    def get_ref_aval(self) -> object: ...


class Layout(Protocol):
    """How an array is distributed over the registers of a warpgroup, one of ``plgpu.Layout``."""

    def to_mgpu(self) -> object: ...


Kernel = Callable[..., jax.Array | tuple[jax.Array, ...]]
"""A kernel as a function of arrays."""
