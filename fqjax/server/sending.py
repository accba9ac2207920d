"""Work that ends when the client has gone, and answers in pieces as server-sent events."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from fqjax.server.answers import Answers
from fqjax.server.choices import Answering
from fqjax.server.errors import ApiError, Disconnected

T = TypeVar("T")

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Does some work, and gives it up when the client goes.

    Raises:
      Disconnected: if it did.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Disconnected
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """An answer that is sent while it comes, as an application of ASGI.

    Args:
      answering: the choices as they come.
      answers: makes the JSON of each piece.
    """

    def __init__(self, answering: Answering, answers: Answers):
        self._answering, self._answers = answering, answers

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Sends everything; when the client goes, what has not ended is cancelled."""
        try:
            await unless_gone(receive, self._send(send))
        except (Disconnected, OSError):
            pass  # Nobody reads on.
        finally:
            self._answering.close()

    async def _send(self, send: Send) -> None:
        async def event(content: str) -> None:
            body = f"data: {content}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            for begin in self._answers.begin():
                await event(_compact(begin))
            async for piece in self._answering.pieces():
                await event(_compact(self._answers.piece(piece, self._answering.tokens)))
            for end in self._answers.end(self._answering.tokens):
                await event(_compact(end))
            await event("[DONE]")
        except ApiError as error:  # The status has been sent.
            await event(_compact(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _compact(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
