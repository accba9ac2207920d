"""The directory in which an unfinished conversion keeps what it has, and who may write to it.

OUT.partial/lock          locked by the process that writes, for as long as it lives
OUT.partial/plan.json     what is being converted; a conversion that is taken up must be the same
OUT.partial/checkpoint    the result while it is being written
OUT.partial/...           what quantization has found out (fqjax/drivers/store.py)
OUT.partial.complete      the same as plan.json; is there from right before the result becomes OUT, and removed last
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fqjax.checkpoint.manifest import MANIFEST_FILE
from fqjax.checkpoint.orbax.write import refuse_existing
from fqjax.drivers.store import ACTIVATIONS_FOLDER
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, read_json, reason, write_whole, writing

LOCK_FILE, RECORD_FILE = "lock", "plan.json"


def staging_directory(out: Path) -> Path:
    """Where an unfinished conversion keeps what it has."""
    return out.with_name(out.name + ".partial")


def completion_file(out: Path) -> Path:
    """What says, beside the staging directory, that a conversion ended but for the removal of that."""
    return out.with_name(out.name + ".partial.complete")


def is_complete(out: Path) -> bool:
    """Whether a conversion ended but for the removal of its staging directory.

    Raises:
      InputError: if that cannot be known.
    """
    return exists(out / MANIFEST_FILE) and exists(completion_file(out))


def publish(finished: Path, out: Path, fingerprint: JsonObject) -> None:
    """Gives a finished directory its name, by one rename.

    Raises:
      InputError: if something has that name by now, or the name cannot be given.
    """
    refuse_existing(out)
    write_whole(completion_file(out), _as_json(fingerprint))
    with writing(out):
        try:
            finished.rename(out)
        except OSError:
            with contextlib.suppress(OSError):
                completion_file(out).unlink()
            raise


def finish(out: Path, error: OSError | None) -> None:
    """Ends a conversion whose result is whole, with a warning if something beside it could not be removed.

    Args:
      out: the result.
      error: of the removal of its staging directory.
    """
    error, left = error or _removed(completion_file(out)), staging_directory(out)
    if error is not None:
        left = left if exists(left) else completion_file(out)
        logging.getLogger(__name__).warning(
            "%s is complete, but %s cannot be removed (%s); remove it, or have --resume do so",
            out,
            left,
            error.strerror or reason(error),
        )


def remove(staging: Path) -> OSError | None:
    """Removes a staging directory so that what is left of it if that is interrupted can still be taken up, or is removed.

    Activations vanish at once, as a pass that found some of them would go on from there.  What says of which conversion it
    is goes last.

    Returns:
      The first error, if something could not be removed.
    """
    with contextlib.suppress(OSError):
        (staging / ACTIVATIONS_FOLDER).rename(staging / f"{ACTIVATIONS_FOLDER}.unfinished")
    last = [staging / RECORD_FILE, staging / LOCK_FILE]
    first: OSError | None = None
    try:
        for path in staging.iterdir():
            if path not in last:
                first = first or _removed(path)
        if first is None:
            for path in last:
                path.unlink(missing_ok=True)
            staging.rmdir()
    except FileNotFoundError:
        pass  # Another conversion that was waiting for it removed it.
    except OSError as error:
        return first or error
    return first


def _removed(path: Path) -> OSError | None:
    """Removes a file or a folder; returns what the operating system has against it."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


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
    if staging.is_symlink() or (exists(staging) and not staging.is_dir()):
        raise InputError(f"{staging}: no directory of its own; expected an unfinished conversion, or nothing")
    with writing(staging):
        staging.mkdir(parents=True, exist_ok=True)
    with _locked(staging):
        record = completion_file(out) if is_complete(out) else staging / RECORD_FILE
        if exists(record) and not resume:
            raise InputError(f"{staging}: an unfinished conversion; pass --resume to go on with it, or remove it")
        if not exists(record):
            _begin(staging, fingerprint)
            with writing(completion_file(out)):  # Of one whose result was never given its name, or was removed.
                completion_file(out).unlink(missing_ok=True)
        begun = read_json(record, "record of a conversion")
        if (then := begun.get("version")) != (now := fingerprint.get("version")):
            raise InputError(
                f"{staging}: begun with fqjax {then or 'of an older version'}, and this is {now}; remove it, or go on with "
                "that version"
            )
        if differing := _differing(begun, fingerprint):
            raise InputError(f"{staging}: begun with other {differing}; remove it, or convert as it was begun")
        yield staging


def _begin(staging: Path, fingerprint: JsonObject) -> None:
    with writing(staging):
        names = sorted(path.name for path in staging.iterdir())
    strangers = [name for name in names if name != LOCK_FILE and not name.endswith(".unfinished")]
    if strangers:
        raise InputError(
            f"{staging}: holds {strangers[0]!r} and no {RECORD_FILE}; expected an unfinished conversion, or nothing"
        )
    write_whole(staging / RECORD_FILE, _as_json(fingerprint))


def _differing(begun: JsonObject, fingerprint: JsonObject) -> str:
    """The first entry of a fingerprint that differs, with the first file if it is one of files; nothing if all are alike."""
    for key, now in fingerprint.items():
        if (then := begun.get(key)) == now:
            continue
        if not isinstance(then, dict) or not isinstance(now, dict):
            return key
        return f"{key} ({next(name for name in sorted({*then, *now}) if then.get(name) != now.get(name))})"
    return ""


def _as_json(fingerprint: JsonObject) -> bytes:
    return json.dumps(fingerprint, indent=1).encode()


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
        except NotImplementedError:
            raise InputError(f"{staging}: no file can be locked there; expected a file system with locks") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # The end of the process releases it.
            lock.release()
