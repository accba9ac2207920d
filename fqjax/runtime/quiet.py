"""Other packages' messages, dropped where what is wrong ends in one line of fqjax's own; the process stays as it was."""

import contextlib
import gc
import inspect
import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator


@contextlib.contextmanager
def muted(*names: str) -> Iterator[None]:
    """Drops what is logged to some loggers, for as long as it lasts, and what their handlers get from loggers below them."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in names]
    places = [place for logger in loggers for place in (logger, *logger.handlers)]
    for place in places:
        place.addFilter(nothing)
    try:
        yield
    finally:
        for place in places:
            place.removeFilter(nothing)


@contextlib.contextmanager
def contained() -> Iterator[Callable[[], None]]:
    """Runs calls of Orbax so that one that fails leaves nothing behind, neither threads at work nor messages.

    Its event loops are closed while reads and writes still run, which complain of that when they end, in the log or by the
    hook of what cannot be raised; what has not begun by then is never awaited.  Anything else is reported as ever.

    Yields:
      Waits for what a failed call still does, and collects its remains; to be called where nothing holds them any more, so
      after :func:`forget` and outside of the handler of the error.
    """
    before = set(threading.enumerate())

    def settle() -> None:
        threads = set(threading.enumerate()) - before
        _join(threads, RELEASE_SECONDS)
        for thread in threads:
            if thread.is_alive():
                _release(thread)
        _join(threads, SETTLE_SECONDS)
        threads.clear()
        _await_reads(SETTLE_SECONDS)
        with _dropping_never_awaited(".*"):  # What is collected here are remains of the failed call.
            gc.collect()

    with muted("absl", "asyncio"), _dropping_of_closed_loops(), _dropping_never_awaited(NEVER_AWAITED_NAMES):
        yield settle


def _join(threads: Iterable[threading.Thread], seconds: float) -> None:
    end = time.monotonic() + seconds
    for thread in threads:
        threading.Thread.join(
            thread, max(end - time.monotonic(), 0)
        )  # That of Orbax's own raises when the time is over.


def _await_reads(seconds: float) -> None:
    """Waits for reads and writes of TensorStore, which run in threads that Python does not know of.

    They tell a loop of it when they end, and hold until then what waits for them.
    """
    future = getattr(sys.modules.get("tensorstore"), "Future", None)
    if future is None:
        return
    end = time.monotonic() + seconds
    reads = [found for found in gc.get_objects() if type(found) is future]
    while time.monotonic() < end and not all(read.done() for read in reads):
        time.sleep(POLL_SECONDS)
    reads.clear()
    time.sleep(POLL_SECONDS)  # For the call with which the last one tells its loop.


def _release(thread: threading.Thread) -> None:
    """Ends a thread of Orbax's that waits for a signal of what has failed; it would for minutes, and the process with it."""
    if not type(thread).__module__.startswith("orbax."):
        return
    with contextlib.suppress(Exception):  # Orbax offers no other way, and another version may have another.
        awaited = vars(thread)["_receive_signals"]
        vars(thread).update(_cancelled=True, _send_signals=awaited)
        thread._set_signals()  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread.join(thread, RELEASE_SECONDS)
        _close_coroutines(vars(thread)["_target"])


def _close_coroutines(function: object) -> None:
    """Closes the coroutines that a function would have run, so that what they hold goes now."""
    for cell in getattr(function, "__closure__", None) or ():
        if inspect.iscoroutine(cell.cell_contents):
            cell.cell_contents.close()
        else:
            _close_coroutines(cell.cell_contents)


def forget(error: BaseException) -> None:
    """Clears what the frames hold in which an error was raised, and those before it: event loops with what runs in them."""
    waiting: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            traceback.clear_frames(one.__traceback__)
            seen.append(one)
            waiting += [one.__cause__, one.__context__]


@contextlib.contextmanager
def _dropping_of_closed_loops() -> Iterator[None]:
    hook = sys.unraisablehook

    def others(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != CLOSED_LOOP_MESSAGE and not _was_closed(unraisable):
            hook(unraisable)

    sys.unraisablehook = others
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _was_closed(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether it is a coroutine that had not ended and was closed, of which it makes an error of another kind."""
    error = unraisable.exc_value
    if not inspect.iscoroutine(unraisable.object) or error is None:
        return False
    return any(isinstance(before, GeneratorExit) for before in (error, error.__cause__, error.__context__))


@contextlib.contextmanager
def _dropping_never_awaited(names: str) -> Iterator[None]:
    """Drops the warnings of coroutines whose qualified name matches a regular expression."""
    # Of all filters only this one is taken away again: another thread may have set some meanwhile.
    warnings.filterwarnings("ignore", f"coroutine '{names}' was never awaited", RuntimeWarning)
    own = warnings.filters[0]
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(own)  # pyright: ignore[reportAttributeAccessIssue]


CLOSED_LOOP_MESSAGE = "Event loop is closed"
"""The message with which reads and writes complain."""

NEVER_AWAITED_NAMES = r"[\w.<>]*(serialize|cancellable|Handler|Store|Layout|_merge_|_process_)[\w.<>]*"
"""Of coroutines that Orbax runs side by side."""

POLL_SECONDS = 0.02
"""Between two looks at reads that have not ended."""

RELEASE_SECONDS, SETTLE_SECONDS = 1.0, 10.0
"""How long a failed call is waited for until what waits for it is released, and after that at most."""
