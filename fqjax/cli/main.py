"""The ``fqjax`` command.  Every subcommand is a file of this package, and a thin layer over one function of the library.

Nothing heavy is imported before a command runs: commands import what they need when they are called.

Exit codes: 0 done; 2 bad usage or bad input, with one line on stderr; 130 interrupted.
"""

import sys

# isort: off
# In the order in which --help lists them.
from fqjax.cli import convert, export, evaluate, generate, inspect, demo, bench, schemes  # noqa: F401

# isort: on
from fqjax.cli.app import app
from fqjax.runtime.errors import InputError
from fqjax.runtime.quiet import CLOSED_LOOP_MESSAGE

INTERRUPTED = 130
"""Exit code that typer makes of Ctrl-C."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        result = app(arguments, standalone_mode=False)
        if result == INTERRUPTED:
            print("fqjax: interrupted", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except InputError as error:
        return _complain(str(error))
    except Exception as error:
        # typer's usage errors come from a vendored module whose name has changed between versions.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = message()
        return _complain(text) if text else 2


def _complain(message: str) -> int:
    print(f"fqjax: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quiet_late_reads(unraisable: "sys.UnraisableHookArgs") -> None:
    """Says nothing of reads that end after a failed load closed their event loop; the failure was reported."""
    if str(unraisable.exc_value) != CLOSED_LOOP_MESSAGE:
        sys.__unraisablehook__(unraisable)


def run() -> None:
    """Entry point of the installed command."""
    sys.unraisablehook = _quiet_late_reads
    sys.exit(main())


if __name__ == "__main__":
    run()
