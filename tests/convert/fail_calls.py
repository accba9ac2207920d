"""Lets one system call at a time fail, in conversions or in saves; run by test_failing_calls.py in a process of its own.

    LD_PRELOAD=failing_calls.so python fail_calls.py convert|save|kill SOURCE FOLDER STRIDE

Prints, as JSON, how many calls there were of each kind, how many were let fail, and what was wrong after one of them.
"""

import contextlib
import ctypes
import errno
import faulthandler
import gc
import io
import json
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from fqjax.cli import main as cli
from fqjax.cli.terminal import show_warnings
from fqjax.runtime.errors import InputError

CALLS = ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir", "truncate")
"""Kinds of calls, as failing_calls.c numbers them."""

FAIL, TORN, KILL, TORN_AND_KILL = range(4)

ERRORS = {
    "open": (errno.EACCES, errno.EIO, errno.ENOSPC),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "rename": (errno.EACCES, errno.EIO, errno.ENOSPC),
    "unlink": (errno.EACCES, errno.EIO, errno.EDQUOT),
    "rmdir": (errno.EACCES, errno.EIO, errno.EDQUOT),
    "mkdir": (errno.EACCES, errno.ENOSPC, errno.EDQUOT),
    "truncate": (errno.EIO,),
}

SECONDS_UNTIL_HUNG = 120

MODE, SOURCE, FOLDER, STRIDE = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
LIBRARY = ctypes.CDLL(None)


def arm(below: Path, call: int, number: int, error: int = 0, mode: int = FAIL) -> None:
    LIBRARY.arm(os.fsencode(below), call, ctypes.c_long(number), error, mode)


def convert(out: Path, *options: str) -> tuple[int, str]:
    """Converts; returns the exit code and what is printed on standard error."""
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        return cli.main(["convert", SOURCE, str(out), "--scheme", "bf16", *options]), told.getvalue()


def contents(out: Path) -> dict[str, bytes]:
    """What is the same in every result: the manifest has the checksums of all the rest, by which that is compared."""
    import fqjax
    from fqjax.checkpoint.tokenizer import load_tokenizer

    fqjax.load(out)
    load_tokenizer(out)
    return {path.name: path.read_bytes() for path in (out / "fqjax.json", *(out / "tokenizer").iterdir())}


def points() -> Iterator[tuple[str, int, int, int]]:
    """Kind, number, error and mode of every call that is to fail, by the calls that were counted."""
    for kind, name in enumerate(CALLS):
        for number in range(1, LIBRARY.counted(kind) + 1, STRIDE):
            error = ERRORS[name][number // STRIDE % len(ERRORS[name])]
            yield name, number, error, TORN if name == "write" and number // STRIDE % 2 else FAIL


def failing(attempt: Callable[[Path], list[str]], again: Callable[[Path], list[str]]) -> dict[str, object]:
    """Makes attempts of which each has one call failing, and after it another without, and collects what is wrong."""
    whole = FOLDER / "whole"
    arm(FOLDER, -1, 0)
    wrong = [f"undisturbed: {fault}" for fault in attempt(whole)]
    counted, expected = {name: LIBRARY.counted(kind) for kind, name in enumerate(CALLS)}, contents(whole)
    chosen = list(points())
    for name, number, error, mode in chosen:
        out = FOLDER / "out"
        faulthandler.dump_traceback_later(SECONDS_UNTIL_HUNG, exit=True)
        arm(FOLDER, CALLS.index(name), number, error, mode)
        try:
            faults = attempt(out)
            arm(FOLDER, -1, 0)
            if out.exists() and contents(out) != expected:
                faults.append("the target is there and not complete")
            faults += again(out)
            if contents(out) != expected:
                faults.append("the second attempt made something else")
        except BaseException as found:
            faults = [f"{type(found).__name__}: {found}"]
        left = [path.name for path in FOLDER.iterdir() if path.name not in ("whole", "out")]
        faults += [f"{left} were left"] if left else []
        wrong += (found := [f"{name} {number} {errno.errorcode[error]} {mode}: {fault}" for fault in faults])
        print(f"{name} {number}", *found, file=sys.stderr, flush=True)  # Where it hangs, it is known at what.
        for path in FOLDER.iterdir():
            if path != whole:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        faulthandler.cancel_dump_traceback_later()
    return {"counted": counted, "failed": len(chosen), "wrong": wrong}


def attempted_conversion(out: Path) -> list[str]:
    code, told = convert(out)
    if told.count("\n") > 1 or code not in (0, 2):
        return [f"ended with {code} and told {told!r}"]
    left = [path for path in FOLDER.glob("out.partial*")]
    if code == 0 and left and "cannot be removed" not in told:
        return [f"left {left} in silence"]
    return [] if code or out.exists() else ["was done and is not there"]


def resumed_conversion(out: Path) -> list[str]:
    done = out.exists() and not list(FOLDER.glob(f"{out.name}.partial*"))
    code, told = (0, "") if done else convert(out, "--resume")
    left = list(FOLDER.glob(f"{out.name}.partial*"))
    return [] if code == 0 and not told and not left else [f"could not be resumed: {told!r}, {left}"]


def save_model() -> tuple[Callable[[Path], list[str]], Callable[[Path], list[str]]]:
    import numpy as np

    import fqjax
    from fqjax.checkpoint.calibration_record import CalibrationRecord
    from fqjax.report.report import report_of

    model, tokenizer = fqjax.load_hf(SOURCE)
    report = report_of(model, record=CalibrationRecord({"a": np.ones(3, np.float32)}, {}))

    heard = messages()

    def save(out: Path) -> list[str]:
        heard.clear()
        try:
            fqjax.save(out, model, tokenizer=tokenizer, report=report)
        except InputError as error:
            left = [path.name for path in FOLDER.iterdir() if path.name != "whole"]
            gc.collect()
            faults = ["several lines"] if "\n" in str(error) else []
            return faults + ([f"left {left}"] if left else []) + [f"told {text}" for text in heard]
        return [f"told {text}" for text in heard]

    def once_more(out: Path) -> list[str]:
        return [] if out.exists() else save(out)

    return save, once_more


def messages() -> list[str]:
    """Whatever anything tells a user besides, from now on: logs, warnings, and what cannot be raised."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(f"{record.name}: {record.getMessage()}")
    logging.getLogger().addHandler(handler)
    warnings.showwarning = lambda message, *_: heard.append(f"{type(message).__name__}: {message}")
    sys.unraisablehook = lambda unraisable: heard.append(f"unraisable: {unraisable.exc_value!r}")
    return heard


def killing() -> dict[str, object]:
    """Conversions that are killed, each in a process that is forked before JAX starts, and taken up again."""
    from fqjax.checkpoint.architecture import read_architecture
    from fqjax.checkpoint.tokenizer import load_tokenizer
    from fqjax.data.text import encode

    # What is imported lazily, and takes longer than such a conversion does.
    read_architecture(Path(SOURCE))
    encode(load_tokenizer(SOURCE), "text")
    wrong, number, whole = [], 0, FOLDER / "whole"
    counted = forked(lambda: (arm(whole, -1, 0), convert(whole), LIBRARY.counted(-1) // 8)[2]) * 8
    chosen = [*range(1, counted, max(counted // STRIDE, 1)), *range(counted - 8, counted + 1, 2)]
    for number in chosen:
        out, mode = FOLDER / f"out-{number}", TORN_AND_KILL if number % 2 else KILL
        code = forked(lambda: (arm(out, -1, number, 0, mode), convert(out)[0])[1])  # noqa: B023
        if code != -signal.SIGKILL:
            wrong.append(f"call {number}: ended with {code}")
        if out.exists() and forked(lambda: int(contents(out) != contents(whole))):  # noqa: B023
            wrong.append(f"call {number}: the target is there and not complete")
        if forked(lambda: (arm(out, -1, 0), resumed_conversion(out) != [] or contents(out) != contents(whole))[1]):  # noqa: B023
            wrong.append(f"call {number}: could not be resumed to the same bits")
    return {"counted": {"all": counted}, "failed": len(chosen), "wrong": wrong}


def forked(run: Callable[[], int]) -> int:
    """The exit code of a forked process; negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    faulthandler.dump_traceback_later(SECONDS_UNTIL_HUNG, exit=True)
    os._exit(int(run()))


def main() -> None:
    logging.raiseExceptions = False
    sys.unraisablehook = cli._quiet_late_reads  # As the installed command does.
    show_warnings()
    if MODE == "kill":
        found = killing()
    else:
        found = failing(*(save_model() if MODE == "save" else (attempted_conversion, resumed_conversion)))
    print(json.dumps(found))


main()
