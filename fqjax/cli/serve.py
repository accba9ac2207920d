"""``fqjax serve``: a model behind an HTTP interface that clients of OpenAI's know."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import KvCache, Model, app, known_cache, load_with_tokenizer
from fqjax.runtime.errors import InputError

MOST_SECONDS = 86400.0

KEY_VARIABLE = "FQJAX_API_KEY"
"""Environment variable with the key: other users of the machine see the options of a command."""


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.")] = 8000,
    slots: Annotated[int, typer.Option(help="Requests that are worked on at once.")] = 16,
    capacity: Annotated[
        int | None,
        typer.Option(help="Tokens of a request at most, prompt and answer.", show_default="2048, or all positions"),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the key-value memory.", show_default="slots x capacity")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that wait at most; more are refused.")] = 1024,
    kv_cache: KvCache = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the last part of MODEL")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must give.", envvar=KEY_VARIABLE, metavar="KEY", show_envvar=True),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body at most.")] = 4 * 2**20,
    grace: Annotated[float, typer.Option(help="Seconds that requests have to end when the server stops.")] = 30.0,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's interface and to a browser."""
    kind = known_cache(kv_cache)
    from fqjax.runtime.arguments import check_whole
    from fqjax.server.app import Settings
    from fqjax.server.run import Limits, allow_many_files, api_of, bound, check_packages, open_to_others, server_of

    check_packages()
    for option, value, least in (("--slots", slots, 1), ("--queue", queue, 0), ("--max-body", max_body, 1)):
        check_whole(option, value, least)
    for option, value in (("--capacity", capacity), ("--tokens", tokens)):
        if value is not None:
            check_whole(option, value, 2)
    check_whole("--port", port, 0, 65535)
    if not 0 <= grace <= MOST_SECONDS:
        raise InputError(f"--grace {grace}: expected seconds from 0 to {MOST_SECONDS:g}")
    _check_key(api_key)
    if not host:
        raise InputError("--host: empty; expected an address")
    listening = bound(host, port)  # Before the model is loaded.
    allow_many_files()
    if api_key is None and open_to_others(listening):
        _say(f"without --api-key or {KEY_VARIABLE} whoever reaches {host} can use the model")
    try:
        loaded, tokenizer = load_with_tokenizer(model)
        limits = Limits(slots=slots, capacity=capacity, tokens=tokens, queue=queue, kv_cache=kind)
        name = name or (Path(model).resolve().name if Path(model).exists() else model)
        api = api_of(
            loaded, tokenizer, name, limits, Settings(api_key, max_body), lambda what: _say(f"compiling {what}")
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening[0].getsockname()[1]}"
        server_of(
            api, grace, lambda: _say(f"serving {name} at {address} (a page), {address}/v1 (OpenAI's interface)")
        ).run(sockets=listening)
        api.engine.join(grace)
    finally:
        for each in listening:
            each.close()
    _say("stopped")


def _check_key(key: str | None) -> None:
    """Refuses a key that no client could give, which is not shown."""
    # Typer takes an empty variable for one that is not set: the server would be open to all.
    key = os.environ.get(KEY_VARIABLE) if key is None else key
    if key == "":
        raise InputError(f"--api-key or {KEY_VARIABLE}: empty; expected a key")
    if key is not None and (key.strip() != key or not key.isprintable()):
        raise InputError(
            "--api-key: holds what no header can carry; expected visible characters, no blanks around them"
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
