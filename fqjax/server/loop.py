"""The thread that runs an engine, and what others ask of it.

An engine takes calls from one thread only.  That thread takes calls out of a queue between two steps, and sleeps while there
is nothing to do.  What requests get goes back to the event loop that asked, once a step.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence

from fqjax.inference.engine import Engine
from fqjax.inference.requests import Output, Request
from fqjax.runtime.files import reason

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The engine takes no requests any more, or has been stopped before this one ended."""


class Job:
    """Requests that were handed in together, and what they get.

    Attributes:
      requests: as they were handed in.
      accepted: done when the engine has taken them, or an exception.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = tuple(requests)
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.tickets: list[int] = []
        self._outputs: asyncio.Queue[tuple[int, Output] | Exception] = asyncio.Queue()

    async def next(self) -> list[tuple[int, Output]]:
        """What has come since, at least one output; each with the number of its request among those handed in.

        Raises:
          Stopped: if the engine has failed.
        """
        found = [await self._outputs.get()]
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                found.append(self._outputs.get_nowait())
        for each in found:
            if isinstance(each, Exception):
                raise each
        return [each for each in found if not isinstance(each, Exception)]

    def put(self, output: tuple[int, Output] | Exception) -> None:
        """Hands over an output; in the thread of the event loop."""
        self._outputs.put_nowait(output)

    def settle(self, error: Exception | None) -> None:
        """Says whether the requests have been taken; in the thread of the event loop."""
        if self.accepted.done():
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)


class EngineLoop:
    """An engine in a thread of its own.

    Args:
      engine: which nobody else calls from now on.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.stopping = False
        self.failure: str | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._left, self._lock = False, threading.Lock()
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._thread = threading.Thread(target=self._run, name="fqjax-engine", daemon=True)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(running is not None for running in self.engine.running)

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return len(self.engine.waiting)

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and self.failure is None and not self.stopping

    def start(self) -> None:
        """Begins to take requests."""
        self._thread.start()

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Hands in requests, all of them or none.

        Raises:
          QueueFull: if too many wait.
          InputError: if one could not be served.
          Stopped: if no requests are taken any more.
        """
        job = Job(requests)
        if not self.alive:
            raise Stopped(self.failure or "the server is stopping")
        with self._lock:
            if self._left:
                raise Stopped(self.failure or "the server has stopped")
            self._calls.put(lambda: self._submit(job))
        try:
            await job.accepted
        except asyncio.CancelledError:
            self.cancel(job)
            raise
        return job

    def cancel(self, job: Job, *numbers: int) -> None:
        """Ends requests of a job, or all of them, with what they have; nothing happens to those that have ended."""

        def call() -> None:
            for at, ticket in enumerate(job.tickets):
                if at in numbers or not numbers:
                    self.engine.cancel(ticket)

        self._calls.put(call)

    def stop(self, grace: float) -> None:
        """Takes no further requests, and ends those that are left after some seconds; returns at once."""
        self.stopping = True
        self._calls.put(lambda: None)
        timer = threading.Timer(grace, self.cut)
        timer.daemon = True
        timer.start()

    def cut(self) -> None:
        """Ends all requests with what they have."""

        def call() -> None:
            for ticket in list(self._jobs):
                self.engine.cancel(ticket)

        self._calls.put(call)

    def join(self, timeout: float | None = None) -> bool:
        """Waits until the thread has ended, which it does when it was stopped and nothing is left; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not (self.stopping and self._calls.empty() and not self.engine.busy):
                if not self.engine.busy:
                    self._calls.get()()
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._calls.get_nowait()()
                if self.engine.busy:
                    self._hand_out(self.engine.step())
        except (
            Exception
        ) as error:  # Such as of a device that has no memory left: nothing can go on, but clients are told.
            self.failure = f"the engine has failed ({reason(error)})"
            logger.exception("the engine has failed")
        finally:
            self._leave()

    def _submit(self, job: Job) -> None:
        try:
            if not self.alive:
                raise Stopped("the server is stopping")
            for request in job.requests:
                job.tickets.append(self.engine.submit(request))
        except Exception as error:  # What is wrong with one request is told to whoever handed it in, and ends no other.
            for ticket in job.tickets:
                self.engine.cancel(ticket)
            job.tickets.clear()
            _call(job.loop, job.settle, error)
            return
        self._jobs |= {ticket: (job, at) for at, ticket in enumerate(job.tickets)}
        _call(job.loop, job.settle, None)

    def _hand_out(self, outputs: list[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, int, Output]]] = {}
        for output in outputs:
            job, at = self._jobs.get(output.ticket, (None, 0))
            if job is None:
                continue  # One of several that were not all taken.
            by_loop.setdefault(job.loop, []).append((job, at, output))
            if output.finished is not None:
                del self._jobs[output.ticket]
        for loop, some in by_loop.items():
            _call(loop, _put, some)

    def _leave(self) -> None:
        """Tells those who still wait that nothing more comes."""
        error = Stopped(self.failure or "the server has stopped")
        self.stopping = True
        with self._lock:
            self._left = True
        for job in {id(job): job for job, _ in self._jobs.values()}.values():
            _call(job.loop, job.put, error)
        self._jobs.clear()
        with contextlib.suppress(queue.Empty):
            while True:  # Those who asked meanwhile.
                self._calls.get_nowait()()


def _put(some: list[tuple[Job, int, Output]]) -> None:
    for job, at, output in some:
        job.put((at, output))


def _call(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """Has an event loop call something, if it still runs."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
