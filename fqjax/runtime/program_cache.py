"""The user's directory of compiled programs, which the command line has JAX keep between its runs.

JAX's key of a program has its code, its flags, the version of jaxlib and the kind of a GPU, but not what a processor can do,
and machines may share a home directory: so each kind of processor, and each jaxlib, has a directory of its own.

JAX writes an entry in place and never again.  One that was written in part, as on a full disk, would be found wrong by every
later run: so all entries are deleted by a run that could not read one, and what it compiled is kept by the next.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

SWITCH = "FQJAX_COMPILATION_CACHE"
"""Environment variable with another directory, or "off"."""

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux says what the processor can do."""

X86 = ("vendor_id", "cpu family", "model", "model name", "flags")
ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")
KINDS = {*X86, *ARM}
"""Entries on which the instructions depend that a compiler chooses."""

JAXS_OWN = "JAX_COMPILATION_CACHE_DIR"

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept: there are many of them, and a file costs time too."""

MOST_BYTES = 2**30
"""What all programs may take; beyond, those that were written first are deleted."""

READING, WRITING = (f"Error {what} persistent compilation cache entry" for what in ("reading", "writing"))
"""How JAX's warnings begin."""


def programs_directory() -> Path:
    """Where programs of this machine and this jaxlib are kept: in :data:`SWITCH`, or the user's directory of caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    asked = os.environ.get(SWITCH)
    base = Path(asked) if asked and asked != "off" else Path(home, "fqjax", "compiled")
    return base / f"{importlib.metadata.version('jaxlib')}-{machine()}"


def machine() -> str:
    """A digest of what kind the processor is and what it can do, or where that is not known of the machine's name."""
    try:
        lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()  # Of the first processor.
    except OSError:
        lines = []
    entries = [line for line in lines if line.partition(":")[0].strip() in KINDS]
    return hashlib.sha256("\n".join([platform.machine(), *(entries or [platform.node()])]).encode()).hexdigest()[:12]


@contextlib.contextmanager
def kept_programs() -> Iterator[Path | None]:
    """Has JAX keep programs that take long to compile while the context is open; before JAX is imported.

    Whatever is wrong with the directory is no reason to fail: then nothing is kept.  Nor is anything done where the user
    has set JAX's own variable, or :data:`SWITCH` to "off".

    Yields:
      The directory in use, or None.
    """
    path = None
    if JAXS_OWN not in os.environ and os.environ.get(SWITCH) != "off" and "jax" not in sys.modules:
        with contextlib.suppress(
            OSError, RuntimeError, ImportError
        ):  # No home directory; no record of jaxlib's version.
            path = _usable(programs_directory())
    if path is None:
        yield None
        return
    wanted = {JAXS_OWN: str(path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(LEAST_SECONDS)}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    with _failures_heard() as failures:
        try:
            yield path
        finally:
            for name in added:
                os.environ.pop(name, None)
            with contextlib.suppress(OSError):
                bound(path if failures else path.parent, 0 if failures else MOST_BYTES)


def _usable(path: Path) -> Path | None:
    """The directory, made if need be, unless it cannot be written, or could be by somebody else: programs in it are run."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    mine = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return path if mine and os.access(path, os.W_OK | os.X_OK) else None


@contextlib.contextmanager
def _failures_heard() -> Iterator[list[str]]:
    """Programs that JAX could not read, of which it warns, and compiles them; nothing is said of it."""
    failures: list[str] = []
    show = warnings.showwarning

    def heard(message: Warning | str, *where: object, **rest: object) -> None:
        text = str(message)
        if text.startswith(READING):
            failures.append(text)
        elif not text.startswith(WRITING):
            show(message, *where, **rest)  # pyright: ignore[reportArgumentType]

    warnings.showwarning = heard
    try:
        yield failures
    finally:
        warnings.showwarning = show


def bound(directory: Path, most: int) -> None:
    """Deletes the programs below a directory that were written first, down to half of ``most`` bytes, if they are more."""
    found = [(status.st_mtime, status.st_size, path) for path in directory.rglob("*-cache") for status in [path.stat()]]
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in sorted(found):
        path.unlink(missing_ok=True)
        total -= size
        if total <= most // 2:
            return
