"""A server from a model: the engine, its thread, the socket, and how it ends."""

import contextlib
import dataclasses
import importlib.util
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from fqjax.inference.engine import Engine
from fqjax.models.cache import Kind
from fqjax.runtime.errors import InputError
from fqjax.server.app import Api, Settings
from fqjax.server.fields import Served
from fqjax.server.loop import EngineLoop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fqjax.models.causal_lm import CausalLM

PACKAGES = ("starlette", "uvicorn")
"""Of the extra ``serve``."""

USUAL_CAPACITY = 2048
"""Tokens of a request at most, where nothing else is asked for and the model has as many positions."""

AFTER_GRACE = 10.0
"""Seconds in which what was cut is to be answered."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is worked on; as for :class:`fqjax.inference.engine.Engine`.

    Attributes:
      slots: requests at once.
      capacity: tokens of a request at most; None for the usual number, or as many as the model has positions.
      tokens: tokens of the key-value memory; None for what all slots can have.
      queue: requests that wait at most.
      kv_cache: "int8" for codes.
    """

    slots: int = 16
    capacity: int | None = None
    tokens: int | None = None
    queue: int = 1024
    kv_cache: Kind | None = None


def lacking_packages() -> list[str]:
    """Packages that serving takes and that are not there."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def check_packages() -> None:
    """Refuses to serve without the packages that it takes.

    Raises:
      InputError: naming those that are not there.
    """
    if lacking := lacking_packages():
        raise InputError(f"serving needs {' and '.join(lacking)}; pip install 'fqjax[serve]'")


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, on which nobody listens yet.

    Raises:
      InputError: if there is no such address, or something else has it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(f"{host}, port {port}: no address of this machine ({error})") from None
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise InputError(f"{host}, port {port}: cannot be listened on ({error.strerror})") from None
    return made


def api_of(
    model: "CausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    name: str,
    limits: Limits | None = None,
    settings: Settings | None = None,
    report: Callable[[str], None] | None = None,
) -> Api:
    """The functions behind the paths, with an engine that runs.

    Args:
      model: to serve.
      tokenizer: the model's.
      name: by which clients ask for it.
      limits: how much is worked on.
      settings: how it is reached.
      report: called with a word on each program before it is compiled; None compiles what is needed when it is.

    Raises:
      InputError: for limits out of range.
    """
    limits = limits or Limits()
    positions = getattr(model.config, "max_length", None) or USUAL_CAPACITY
    capacity = min(USUAL_CAPACITY, positions) if limits.capacity is None else limits.capacity
    if capacity > (getattr(model.config, "max_length", None) or capacity):
        raise InputError(f"capacity {capacity}: expected at most {positions}, the positions of the model")
    rest = {"tokens": limits.tokens, "queue": limits.queue, "kv_cache": limits.kv_cache}
    engine = Engine(model, slots=limits.slots, capacity=capacity, **rest)  # pyright: ignore[reportArgumentType]
    if report is not None:
        engine.warm_up(report)
    loop = EngineLoop(engine)
    loop.start()
    return Api(loop, Served(name, model.config, tokenizer, min(capacity, engine.tokens_in_all)), settings or Settings())


def server_of(api: Api, grace: float, ready: Callable[[], None] = lambda: None) -> Any:
    """A server of uvicorn's, whose ``run(sockets=[...])`` returns when it has been stopped.

    It is stopped by SIGINT and SIGTERM, or by its ``stop()``: it takes no further requests, and ends those that are left
    after ``grace`` seconds; a second signal does so at once.

    Args:
      api: to serve.
      grace: seconds.
      ready: called once it listens.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """With the engine's end before its own."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.stop()

        def stop(self) -> None:
            """Ends; called again, at once."""
            if self.should_exit:
                api.engine.cut()
            else:
                self.should_exit = True
                api.engine.stop(grace)

    limit = int(grace + AFTER_GRACE)
    config = uvicorn.Config(
        api.app(), log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=limit
    )
    return Server(config)
