"""``fqjax eval``: perplexity on a text."""

import time
from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import JsonFile, KvCache, Model, app, console, known_cache, load_with_tokenizer, write_json


@app.command("eval")
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to predict.", metavar="FILE")],
    window: Annotated[
        int | None, typer.Option(help="Tokens in a window, BOS among them.", show_default="512, or all positions")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    kv_cache: KvCache = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a model's perplexity on a text."""
    kind = known_cache(kv_cache)
    from fqjax.data.text import encode, read_text, usual_window
    from fqjax.evaluation.perplexity import cut_windows, perplexity
    from fqjax.runtime.arguments import check_whole

    for option, value, least in (("--window", window, 2), ("--windows", windows, 1)):
        if value is not None:
            check_whole(option, value, least, None)
    content = read_text(text)
    loaded, tokenizer = load_with_tokenizer(model)
    ids = encode(tokenizer, content)
    window = usual_window(window, loaded.config)
    start = time.perf_counter()
    value = perplexity(loaded, ids, window, windows=windows, kv_cache=kind)
    tokens = len(cut_windows(ids, window, loaded.config.bos_token_id, windows)) * (window - 1)
    result = {"perplexity": value, "tokens": tokens, "seconds": time.perf_counter() - start}
    console.print(f"perplexity {value:.4f} over {tokens} tokens, {result['seconds']:.1f} s")
    write_json(json_file, result)
