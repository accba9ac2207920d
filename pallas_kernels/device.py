"""This process's GPU, caches that depend on it, and the log of which implementation runs.

Other modules ask through the module (``device.hopper_device()``), so that a test or a script that replaces a name here
replaces it everywhere.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

NO_HOPPER = "it needs an NVIDIA GPU of compute capability 9.0"
NO_GPU = "it needs an NVIDIA GPU of compute capability 8.0 or more"
log = logging.getLogger("pallas_kernels")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_clear: list[Callable[[], None]] = []


def cached(f: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``functools.cache`` that :func:`clear_caches` empties."""
    held = functools.cache(f)
    _clear.append(held.cache_clear)
    return held  # pyright: ignore[reportReturnType]


def clear_caches() -> None:
    """Forgets the device, what was built for it, and what was logged."""
    for clear in _clear:
        clear()


@cached
def capability() -> tuple[int, int]:
    """Compute capability of this process's NVIDIA GPU; (0, 0) if it has none."""
    try:
        major, minor = jax.devices("cuda")[0].compute_capability.split(".")
    except (RuntimeError, AttributeError):
        return 0, 0
    return int(major), int(minor)


@cached
def hopper_device() -> str | None:
    """The name of this process's Hopper GPU; None if it has none."""
    return jax.devices("cuda")[0].device_kind if capability() == (9, 0) else None


@cached
def has_triton() -> bool:
    """Whether this version of JAX has the Triton backend of Pallas."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


@cached
def say(name: str, shape: tuple[int, ...], choice: str, why: str) -> None:
    """Logs once which implementation runs for operands of a shape, and why the kernel does not where it does not."""
    log.info("%s %s: %s%s", name, " x ".join(map(str, shape)), choice, f" ({why})" if why else "")
