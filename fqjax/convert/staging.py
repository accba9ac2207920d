"""The directory in which an unfinished conversion keeps what it has, and who may write to it.

OUT.partial/lock          locked by the process that writes, for as long as it lives
OUT.partial/plan.json     what is being converted; a conversion that is taken up must be the same
OUT.partial/checkpoint    the result while it is being written
OUT.partial/complete      is there from right before the result becomes OUT
OUT.partial/...           what quantization has found out (fqjax/drivers/store.py)
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fqjax.checkpoint.manifest import MANIFEST_FILE
from fqjax.checkpoint.orbax.write import refuse_existing
from fqjax.drivers.store import ACTIVATIONS_FOLDER
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, read_json, write_whole, writing

LOCK_FILE, RECORD_FILE, COMPLETE_FILE = "lock", "plan.json", "complete"


def staging_directory(out: Path) -> Path:
    """Where an unfinished conversion keeps what it has."""
    return out.with_name(out.name + ".partial")


def is_complete(out: Path) -> bool:
    """Whether a conversion ended but for the removal of its staging directory."""
    staging = staging_directory(out)
    if not (out / MANIFEST_FILE).is_file() or not staging.is_dir():
        return False
    return (staging / COMPLETE_FILE).is_file() or not any(staging.iterdir())


def publish(finished: Path, out: Path) -> None:
    """Gives a finished directory its name, by one rename.

    Raises:
      InputError: if something has that name by now, or the name cannot be given.
    """
    refuse_existing(out)
    write_whole(staging_directory(out) / COMPLETE_FILE, b"")
    with writing(out):
        finished.rename(out)


def remove(staging: Path) -> None:
    """Removes a staging directory so that what is left of it if that is interrupted can still be taken up, or is removed.

    Activations vanish at once, as a pass that found some of them would go on from there.
    """
    with contextlib.suppress(OSError):
        (staging / ACTIVATIONS_FOLDER).rename(staging / f"{ACTIVATIONS_FOLDER}.unfinished")
    for path in [*staging.glob("*")] if staging.is_dir() else []:
        if path.name not in (LOCK_FILE, COMPLETE_FILE, RECORD_FILE):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # Windows removes no file that is open, such as the lock.
        for name in (RECORD_FILE, LOCK_FILE, COMPLETE_FILE):
            (staging / name).unlink(missing_ok=True)
        staging.rmdir()


@contextlib.contextmanager
def claimed(out: Path, fingerprint: JsonObject, resume: bool) -> Iterator[Path]:
    """Holds a conversion's staging directory for this process, begun anew or taken up where it was left.

    Args:
      out: what is to become of the conversion.
      fingerprint: identifies the conversion.
      resume: whether an unfinished one may be taken up.

    Raises:
      InputError: if another process holds it, an unfinished conversion stands in the way or was begun with another
        fingerprint, or the directory cannot be written.
    """
    staging = staging_directory(out)
    record = staging / RECORD_FILE
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging):
        if record.is_file() and not resume:
            raise InputError(f"{staging}: an unfinished conversion; pass --resume to go on with it, or remove it")
        if not record.is_file():
            strangers = sorted(
                p.name
                for p in staging.iterdir()
                if p.name not in (LOCK_FILE, COMPLETE_FILE) and p.suffix != ".unfinished"
            )
            if strangers:
                raise InputError(
                    f"{staging}: holds {strangers[0]!r} and no {RECORD_FILE}; expected an unfinished conversion, or nothing"
                )
            write_whole(record, json.dumps(fingerprint, indent=1).encode())
        begun = read_json(record, "record of a conversion")
        differing = [key for key in fingerprint if begun.get(key) != fingerprint[key]]
        if differing:
            raise InputError(f"{staging}: begun with other {differing[0]}; remove it, or convert as it was begun")
        yield staging


@contextlib.contextmanager
def _locked(staging: Path) -> Iterator[None]:
    lock = FileLock(staging / LOCK_FILE)
    with writing(staging):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{staging}: another conversion is writing to it") from None
        except FileNotFoundError:  # The other conversion ended, and took the directory with it.
            raise InputError(f"{staging}: another conversion was writing to it until just now; try again") from None
    try:
        yield
    finally:
        lock.release()
