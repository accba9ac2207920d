"""``fqjax generate``: prompts continued, or a conversation, printed as the tokens come."""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from fqjax.cli.app import JsonFile, KvCache, Model, app, known_cache, load_with_tokenizer, write_json
from fqjax.runtime.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fqjax.models.causal_lm import CausalLM

STANDARD_INPUT = "-"


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Text to continue, - for standard input; repeatable.", metavar="TEXT"),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer by the chat template; without --prompt, line by line.", show_default=False),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: what the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to append at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Draw tokens at least this times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens that were there less likely.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="Text that ends the continuation; repeatable.", metavar="TEXT")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    kv_cache: KvCache = None,
    json_file: JsonFile = None,
) -> None:
    """Continue prompts, or chat; text is printed as it comes."""
    kind = known_cache(kv_cache)
    from fqjax.inference.settings import Draws, check_settings

    draws = Draws(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    check_settings(max_new_tokens, draws)  # Before a model is loaded.
    if not prompts and not chat:
        raise InputError("--prompt: expected text to continue, or --chat")
    if system is not None and not chat:
        raise InputError("--system: an option of --chat")
    if any(not text for text in stop or ()):
        raise InputError("--stop: empty; expected text")
    texts = None if prompts is None else [_read(prompt) for prompt in prompts]
    writer = _Writer(*load_with_tokenizer(model), draws, max_new_tokens, kind, tuple(stop or ()))
    if chat:
        turns = writer.chat(_lines() if texts is None else iter(texts), system)
    else:
        turns = [writer.write(text, writer.encode(text), echo=True) for text in texts or ()]
    write_json(json_file, {"continuations": turns})


class _Writer:
    """Continues prompts, and prints their text."""

    def __init__(
        self,
        model: "CausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        draws: object,
        limit: int,
        kv_cache: object,
        stop: tuple[str, ...],
    ):
        self.model, self.tokenizer, self.draws, self.limit = model, tokenizer, draws, limit
        self.kv_cache, self.stop = kv_cache, stop

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        from fqjax.data.text import encode_prompt

        return encode_prompt(self.tokenizer, self.model.config, text)

    def chat(self, turns: Iterator[str], system: str | None) -> list[Mapping[str, object]]:
        """Answers one turn after the other, each of which sees those before."""
        from fqjax.data.chat import chat_prompt

        messages = [] if system is None else [{"role": "system", "content": system}]
        found = []
        for text in turns:
            messages.append({"role": "user", "content": text})
            found.append(self.write(text, chat_prompt(self.tokenizer, messages), echo=False))
            messages.append({"role": "assistant", "content": str(found[-1]["text"])})
        return found

    def write(self, prompt: str, tokens: list[int], *, echo: bool) -> Mapping[str, object]:
        """Prints a continuation as it comes, and how fast it came on standard error."""
        import dataclasses

        from fqjax.data.incremental import new_text
        from fqjax.inference.generate import stream

        settings = dataclasses.asdict(self.draws)  # pyright: ignore[reportArgumentType]
        begun, times, text = time.perf_counter(), [], []
        new = stream(self.model, tokens, self.limit, **settings, kv_cache=self.kv_cache)  # pyright: ignore

        def timed() -> Iterator[int]:
            for token in new:
                times.append(time.perf_counter() - begun)
                yield int(token)

        # Plain output: a model's text is not markup.
        print(prompt if echo else "", end="", flush=True)
        for piece in new_text(self.tokenizer, self.model.config, tokens, timed(), self.stop):
            text.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
        speed = "" if rate is None else f", then {rate:.3g} tokens a second"
        print(f"({len(times)} tokens, the first after {times[0]:.2f} s{speed})", file=sys.stderr, flush=True)
        return {
            "prompt": prompt,
            "text": "".join(text),
            "prompt_tokens": len(tokens),
            "tokens": len(times),
            "seconds": times[-1],
            "seconds_to_first_token": times[0],
        }


def _read(prompt: str) -> str:
    """A prompt, or for ``-`` what standard input holds."""
    return sys.stdin.read() if prompt == STANDARD_INPUT else prompt


def _lines() -> Iterator[str]:
    """What somebody types, line by line, until the input ends."""
    asks = sys.stdin.isatty()
    while True:
        print("> " if asks else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
