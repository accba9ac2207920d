"""A server from a model: the engine, its thread, the socket, and how it ends."""

import contextlib
import dataclasses
import errno
import importlib.util
import ipaddress
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

KEPT_ALIVE = 75
"""Seconds for which a connection without a request is kept: longer than clients do, which may ask as it is closed."""

MOST_FILES = 2**16
"""Files that the process may have open, if the system lets it."""

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


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets with the addresses of that name, on which nobody listens yet; all with one port, where any that is free may be.

    Raises:
      InputError: if there is no such address, or something else has it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError, ValueError) as error:
        raise InputError(f"{host}, port {port}: no address of this machine ({error})") from None
    made: list[socket.socket] = []
    failed: OSError | None = None
    for family, kind, protocol, _, (address, _, *rest) in found:
        taken = port or (made[0].getsockname()[1] if made else 0)
        try:
            made.append(_bound(socket.socket(family, kind, protocol), (address, taken, *rest)))
        except OSError as error:
            failed = error
            if error.errno == errno.EADDRINUSE:
                break
    # A name may have addresses that the machine has not: "localhost" that of IPv6.
    if failed is not None and (failed.errno == errno.EADDRINUSE or not made):
        for each in made:
            each.close()
        raise InputError(f"{host}, port {port}: cannot be listened on ({failed.strerror})")
    return made


def _bound(made: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if made.family == socket.AF_INET6:  # All addresses are those of IPv4 too.
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def open_to_others(listening: list[socket.socket]) -> bool:
    """Whether an address can be reached from other machines."""
    addresses = [each.getsockname()[0].partition("%")[0] for each in listening]
    return not all(ipaddress.ip_address(address).is_loopback for address in addresses)


def allow_many_files() -> None:
    """Lets this process have as many files open as it may, as each connection is one."""
    try:
        import resource
    except ImportError:  # Not on Windows.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
    positions = getattr(model.config, "max_length", None)
    capacity = min(USUAL_CAPACITY, positions or USUAL_CAPACITY) if limits.capacity is None else limits.capacity
    if positions is not None and capacity > positions:
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
            try:
                await super().startup(sockets)
            except OSError as error:  # Another program listens there since the model was being loaded.
                raise InputError(f"the port cannot be listened on ({error.strerror})") from None
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
        api.app(),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=KEPT_ALIVE,
        timeout_graceful_shutdown=limit,
    )
    return Server(config)
