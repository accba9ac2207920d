"""Compiled programs that are kept between runs of the tests, outside the repository.

JAX's key of a program has its code, its flags and the version of jaxlib.  The directory has the processor's abilities too, as
machines may share a home directory, and the version, so that what is of no use any more can be deleted.
"""

import hashlib
import importlib.metadata
import os
from pathlib import Path

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept: there are many of them, and a file costs time too."""

MOST_BYTES = 2**30
"""JAX locks a cache of limited size, so that no process reads what another has written in part."""


def directory() -> Path | None:
    """Where FQJAX_TEST_CACHE says, by default in the user's cache; None if it says "off"."""
    asked = os.environ.get("FQJAX_TEST_CACHE", "")
    if asked == "off":
        return None
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(asked) if asked else caches / "fqjax-tests") / f"{importlib.metadata.version('jaxlib')}-{machine()}"


def machine() -> str:
    """A digest of what the processor can do and of what the compiler is told."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    abilities = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = [os.environ.get(name, "") for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")]
    return hashlib.sha256("\n".join([abilities, *told]).encode()).hexdigest()[:12]


def use() -> None:
    """Has JAX keep programs, in this process alone: one that a test kills would leave them written in part."""
    import jax

    if (path := directory()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
