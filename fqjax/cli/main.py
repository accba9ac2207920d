"""The ``fqjax`` command.  Every subcommand is a file of this package, and a thin layer over one function of the library.

Nothing heavy is imported before a command runs: commands import what they need when they are called.

Exit codes: 0 done; 2 bad usage or bad input, with one line on stderr; 130 interrupted.
"""

import contextlib
import errno
import os
import sys

# isort: off
# In the order in which --help lists them.
from fqjax.cli import convert, export, evaluate, generate, serve, inspect, demo, bench, schemes  # noqa: F401

# isort: on
from fqjax.cli.app import Interrupted, app
from fqjax.cli.terminal import complain, flushed, open_streams, show_warnings
from fqjax.cli.usage import usage_message
from fqjax.runtime.errors import InputError
from fqjax.runtime.program_cache import kept_programs
from fqjax.runtime.quiet import CLOSED_LOOP_MESSAGE

INTERRUPTED = 130
"""Exit code that typer makes of Ctrl-C."""

COMPUTING = ("convert", "export", "eval", "generate", "serve", "inspect", "demo")
"""Commands whose programs are kept for the next run; ``bench`` times how long they take to compile."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        result = app(arguments, standalone_mode=False)
        if result == INTERRUPTED:
            complain("interrupted")
        if (error := flushed()) is not None:
            return _ended_by(error, error)
        return result if isinstance(result, int) else 0
    except Interrupted as error:
        complain(str(error))
        return INTERRUPTED
    except InputError as error:
        return _complain(str(error))
    except OSError as error:
        # What could not be written is not tried again, so that it takes another character to find out.
        return _ended_by(error, flushed("\n") if error.filename is None else None)
    except Exception as error:
        text = usage_message(error)
        if text is None:
            raise
        return _complain(text) if text else 2


def _ended_by(error: OSError, of_output: OSError | None) -> int:
    """The exit code of what the operating system put an end to, which was not expected to."""
    if error.errno == errno.EPIPE:  # Whoever read what is printed has gone, as ``head`` does.
        return 1
    if of_output is not None:
        return _complain(f"standard output: cannot be written ({of_output.strerror})")
    named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return _complain(f"{named}{error.strerror or error}")


def _complain(message: str) -> int:
    complain(f"error: {message}")
    return 2


def _quiet_late_reads(unraisable: "sys.UnraisableHookArgs") -> None:
    """Says nothing of reads that end after a failed load closed their event loop; the failure was reported."""
    if str(unraisable.exc_value) != CLOSED_LOOP_MESSAGE:
        sys.__unraisablehook__(unraisable)


def run() -> None:
    """Entry point of the installed command."""
    open_streams()
    show_warnings()
    sys.unraisablehook = _quiet_late_reads
    with kept_programs() if sys.argv[1:2] and sys.argv[1] in COMPUTING else contextlib.nullcontext():
        code = main()
    sys.exit(code)


if __name__ == "__main__":
    run()
