"""``fqjax serve``: a model behind an HTTP interface that clients of OpenAI's know."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import KvCache, Model, app, known_cache, load_with_tokenizer
from fqjax.runtime.errors import InputError

MOST_SECONDS = 86400.0


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
        typer.Option(help="Key that clients must give.", envvar="FQJAX_API_KEY", metavar="KEY", show_envvar=True),
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body at most.")] = 4 * 2**20,
    grace: Annotated[float, typer.Option(help="Seconds that requests have to end when the server stops.")] = 30.0,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's interface and to a browser."""
    kind = known_cache(kv_cache)
    from fqjax.runtime.arguments import check_whole
    from fqjax.server.app import Settings
    from fqjax.server.run import Limits, api_of, bound, check_packages, server_of

    check_packages()
    for option, value, least in (("--slots", slots, 1), ("--queue", queue, 0), ("--max-body", max_body, 1)):
        check_whole(option, value, least)
    for option, value in (("--capacity", capacity), ("--tokens", tokens)):
        if value is not None:
            check_whole(option, value, 2)
    check_whole("--port", port, 0, 65535)
    if not 0 <= grace <= MOST_SECONDS:
        raise InputError(f"--grace {grace}: expected seconds from 0 to {MOST_SECONDS:g}")
    if api_key == "":
        raise InputError("--api-key: empty; expected a key")
    if api_key is not None and (api_key.strip() != api_key or not api_key.isprintable()):
        raise InputError(
            "--api-key: holds what no header can carry; expected visible characters, no blanks around them"
        )
    if not host:
        raise InputError("--host: empty; expected an address")
    listening = bound(host, port)  # Before the model is loaded.
    try:
        loaded, tokenizer = load_with_tokenizer(model)
        limits = Limits(slots=slots, capacity=capacity, tokens=tokens, queue=queue, kv_cache=kind)
        name = name or (Path(model).resolve().name if Path(model).exists() else model)
        api = api_of(
            loaded, tokenizer, name, limits, Settings(api_key, max_body), lambda what: _say(f"compiling {what}")
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        server_of(
            api, grace, lambda: _say(f"serving {name} at {address} (a page), {address}/v1 (OpenAI's interface)")
        ).run(sockets=[listening])
        api.engine.join(grace)
    finally:
        listening.close()
    _say("stopped")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
