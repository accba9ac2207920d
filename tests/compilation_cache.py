"""Compiled programs that are kept between runs of the tests, outside the repository.

JAX's key of a program has its code, its flags and the version of jaxlib.  The directory has the processor's abilities too, as
machines may share a home directory, and the version, so that what is of no use any more can be deleted.

JAX writes a file where others read it, and a cache of limited size, which it locks, looks through all its files for each that
it writes.  So every process of a run has a directory of its own, and a run begins with what all of the last one found.
"""

import fcntl
import hashlib
import importlib.metadata
import os
from pathlib import Path

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept: there are many of them, and a file costs time too."""

MOST_BYTES = 2**30
"""What the directories may hold before all is deleted."""

LOCKS = []
"""Open files whose locks this process holds until it ends."""


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

    if (folder := directory()) is None:
        return
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    path = folder / (worker or "main")
    path.mkdir(parents=True, exist_ok=True)
    if not locked(path):
        return  # Another run has it.
    if worker is None:
        share(folder)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def locked(path: Path) -> bool:
    """Takes the lock of a directory until the process ends, unless another has it."""
    file = open(path / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return False
    LOCKS.append(file)
    return True


def share(folder: Path) -> None:
    """Gives each process's directory links to the programs of all, or deletes all where they have become too many."""
    entries = {path.name: path for path in folder.glob("*/*-cache")}
    if sum(path.stat().st_size for path in entries.values()) > MOST_BYTES:
        for path in folder.glob("*/*-cache"):
            path.unlink()
        return
    for path in (path for path in folder.iterdir() if path.is_dir()):
        for name in entries.keys() - set(os.listdir(path)):
            os.link(entries[name], path / name)
