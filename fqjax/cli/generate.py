"""``fqjax generate``: a prompt continued."""

from typing import Annotated

import typer

from fqjax.cli.app import KvCache, Model, app, known_cache, load_with_tokenizer


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.", metavar="TEXT")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to append at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    kv_cache: KvCache = None,
) -> None:
    """Continue a prompt."""
    kind = known_cache(kv_cache)
    from fqjax.data.text import decode_new, encode_prompt
    from fqjax.inference.generate import generate as run
    from fqjax.inference.settings import Draws, check_settings

    check_settings(max_new_tokens, Draws(temperature=temperature, top_p=top_p, seed=seed))  # Before a model is loaded.
    loaded, tokenizer = load_with_tokenizer(model)
    tokens = encode_prompt(tokenizer, loaded.config, prompt)
    new = run(loaded, tokens, max_new_tokens, temperature, top_p, seed, kv_cache=kind)
    # Plain output: a model's text is not markup.
    print(prompt + decode_new(tokenizer, loaded.config, tokens, new))
