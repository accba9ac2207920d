"""The HTTP interface: its paths, who may use them, and how long a body may be."""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fqjax.data.chat import has_template
from fqjax.inference.engine import QueueFull
from fqjax.runtime.errors import InputError, TooLong
from fqjax.server.answers import Answers
from fqjax.server.choices import Answering, token_texts
from fqjax.server.errors import ApiError, Disconnected
from fqjax.server.fields import Asked, Served, chat_of, completion_of
from fqjax.server.loop import EngineLoop, Stopped
from fqjax.server.metrics import Metrics
from fqjax.server.sending import EventStream, unless_gone

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page.html"

PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing from elsewhere; nor may it be shown inside another."""

MOST_DROPPED = 8
"""How many times the limit of a body is read of one that is too long, so that the client gets to read the answer."""

BODY_SECONDS = 60.0
"""In which the next piece of a body has to come."""

LONG_BODY = 2**15
"""Bytes of a body whose text takes so long to be made tokens that others would wait; another thread does it."""

EXTRA_HEADERS = {
    408: {"connection": "close"},  # What comes of the body after all is no request.
    413: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "1"},
}
"""Of answers that are errors, by status."""

ANY_METHOD = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
"""Methods that reach the endpoints here, which say in the interface's form what they take."""

Endpoint = Callable[["Request"], Awaitable[Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the server is reached.

    Attributes:
      api_key: which every call of ``/v1`` must give; None for none.
      max_body: bytes of a body at most.
    """

    api_key: str | None = None
    max_body: int = 4 * 2**20


class Api:
    """The functions behind the paths.

    Args:
      engine: started already.
      served: the model.
      settings: how it is reached.
    """

    def __init__(self, engine: EngineLoop, served: Served, settings: Settings):
        self.engine, self.served, self.settings = engine, served, settings
        self.metrics = Metrics()
        self._began = int(time.time())
        self._text_of = token_texts(served.tokenizer)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "fqjax-reader")

    def app(self) -> "Starlette":
        """The application, as ASGI servers take it."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        paths: list[tuple[str, str, Endpoint, bool]] = [
            ("/", "GET", self.page, False),
            ("/health", "GET", self.health, False),
            ("/metrics", "GET", self.show_metrics, False),
            ("/v1/models", "GET", self.models, True),
            ("/v1/models/{name:path}", "GET", self.model, True),
            ("/v1/completions", "POST", self.complete, True),
            ("/v1/chat/completions", "POST", self.chat, True),
        ]
        routes = [
            Route(path, self._guarded(method, call, locked), methods=ANY_METHOD) for path, method, call, locked in paths
        ]
        routes.append(Route("/{path:path}", self._guarded(None, self._nowhere, False), methods=ANY_METHOD))
        return Starlette(routes=routes, exception_handlers={HTTPException: _unusual})

    async def page(self, request: "Request") -> "Response":
        """A page to chat with the model."""
        from starlette.responses import HTMLResponse

        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": PAGE_POLICY})

    async def health(self, request: "Request") -> "Response":
        """Whether requests are taken."""
        if not self.engine.alive:
            raise ApiError(503, self.engine.failure or "the server is stopping")
        return _json({"status": "ok"})

    async def show_metrics(self, request: "Request") -> "Response":
        """Counts and times for Prometheus."""
        from starlette.responses import PlainTextResponse

        loop = self.engine
        held, in_all = loop.engine.tokens_held, loop.engine.tokens_in_all
        text = self.metrics.text(loop.running, loop.waiting, held, in_all)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: "Request") -> "Response":
        """The one model that is served."""
        return _json({"object": "list", "data": [self._card]})

    async def model(self, request: "Request") -> "Response":
        """The model of that name."""
        if request.path_params["name"] != self.served.name:
            raise ApiError(404, f"no such model; expected {self.served.name!r}", "model", "model_not_found")
        return _json(self._card)

    async def complete(self, request: "Request") -> Any:
        """Continues prompts."""
        return await self._answer(request, completion_of)

    async def chat(self, request: "Request") -> Any:
        """Answers a conversation."""
        return await self._answer(request, chat_of)

    @property
    def _card(self) -> dict[str, object]:
        served, chat = self.served, has_template(self.served.tokenizer)
        card = {"id": served.name, "object": "model", "created": self._began, "owned_by": "fqjax"}
        return card | {"max_model_len": served.capacity, "chat": chat}

    async def _answer(self, request: "Request", read: Callable[[object, Served], Asked]) -> Any:
        began, asked = time.perf_counter(), None
        try:
            asked = await self._asked(request, read)
            if not self.engine.alive:
                raise Stopped(self.engine.failure or "the server is stopping")
            job = await unless_gone(request.receive, self.engine.submit(asked.requests))
        except Exception as error:
            outcome = "cancelled" if isinstance(error, Disconnected) else "refused"
            self.metrics.ended(outcome, 1 if asked is None else len(asked.requests))
            raise _as_api_error(error) from error
        self.metrics.prompt_tokens += asked.prompt_tokens
        answering = Answering(self.engine, job, asked, self.served, self.metrics, began)
        answers = Answers(asked, self.served.name, self._text_of)
        if asked.streamed:
            return EventStream(answering, answers)
        try:
            return _json(await unless_gone(request.receive, _whole(answering, answers)))
        finally:
            answering.close()

    async def _asked(self, request: "Request", read: Callable[[object, Served], Asked]) -> Asked:
        """What a call asks for."""
        kind, data = (
            request.headers.get("content-type", "").partition(";")[0].strip().lower(),
            await self._body(request),
        )
        if kind != "application/json":
            # Pages of other sites may send any other kind without having asked whether they may.
            raise ApiError(415, "content-type: expected application/json")

        def asked() -> Asked:
            return read(_json_of(data), self.served)

        if len(data) < LONG_BODY:
            return asked()

        async def elsewhere() -> Asked:
            return await asyncio.get_running_loop().run_in_executor(self._reader, asked)

        return await unless_gone(request.receive, elsewhere())

    async def _body(self, request: "Request") -> bytes:
        """A body, not too long, that has come within a while."""
        from starlette.requests import ClientDisconnect

        most, data, length = self.settings.max_body, bytearray(), 0
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                async for piece in request.stream():
                    limit.reschedule(clock() + BODY_SECONDS)
                    length += len(piece)
                    # One that is too long is read on for a while: a client that is still sending would not see the answer.
                    if length <= most:
                        data += piece
                    elif length > MOST_DROPPED * most:
                        break
        except ClientDisconnect:
            raise Disconnected from None
        except TimeoutError:
            raise ApiError(408, f"nothing more of the body has come for {BODY_SECONDS:g} s") from None
        if length > most:
            raise ApiError(413, f"a body of more than {most} bytes; expected at most {most}")
        return bytes(data)

    def _guarded(self, method: str | None, call: Endpoint, locked: bool) -> Endpoint:
        """An endpoint that answers errors in the form of the interface."""

        async def endpoint(request: "Request") -> Any:
            try:
                if locked:
                    self._check_key(request)
                taken = ("GET", "HEAD") if method == "GET" else (method,)
                if method is not None and request.method not in taken:
                    error = ApiError(405, f"{request.url.path}: takes {method}, not {request.method}")
                    return _json(error.body, error.status, {"allow": ", ".join(filter(None, taken))})
                return await call(request)
            except ApiError as error:
                return _json(error.body, error.status, EXTRA_HEADERS.get(error.status, {}))
            except Disconnected:
                return _json({}, 499)  # Nobody reads it.
            except Exception:  # A fault of this program: the client gets no more than that.
                logger.exception("%s has failed", request.url.path)
                return _json(ApiError(500, "the server has failed; its log says more").body, 500)

        return endpoint

    def _check_key(self, request: "Request") -> None:
        key = self.settings.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
            raise ApiError(401, "expected the server's API key, as 'Authorization: Bearer KEY'", code="invalid_api_key")

    async def _nowhere(self, request: "Request") -> "Response":
        raise ApiError(404, f"{request.url.path}: no such path")


async def _whole(answering: Answering, answers: Answers) -> dict[str, Any]:
    pieces = [piece async for piece in answering.pieces()]
    return answers.whole(pieces, answering.tokens)


def _as_api_error(error: Exception) -> Exception:
    """An error of the engine as the interface names it."""
    text = str(error)
    if isinstance(error, QueueFull):
        return ApiError(429, text, code="queue_full")
    if isinstance(error, InputError):
        return ApiError(400, text, code="context_length_exceeded" if isinstance(error, TooLong) else None)
    if isinstance(error, Stopped):
        return ApiError(503, text)
    return error


async def _unusual(request: "Request", error: Exception) -> "Response":
    """The answer to what reaches no endpoint: methods that nobody knows, paths without a slash."""
    status = getattr(error, "status_code", 500)
    return _json(ApiError(status, f"{request.method} {request.url.path}: nothing takes it").body, status)


def _json_of(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({' '.join(str(error).split())})") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    from starlette.responses import Response

    # In ASCII: texts may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    return Response(json.dumps(content), status, headers, "application/json")
