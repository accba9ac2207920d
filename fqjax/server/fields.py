"""What the bodies of requests ask for."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fqjax.data.chat import chat_prompt, has_template
from fqjax.data.text import encode_prompt
from fqjax.inference.requests import MOST_LOGPROBS, Request
from fqjax.runtime.arguments import shown
from fqjax.runtime.errors import InputError
from fqjax.server.checks import Fields
from fqjax.server.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHOICES = 128
"""Continuations that one call may ask for: prompts times ``n``."""

COMPLETION_TOKENS = 16
"""What ``max_tokens`` of a completion is where it is not given, as OpenAI has it; a chat gets what there is room for."""

_DRAWS = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"})
_COMMON = _DRAWS | {"model", "stream", "stream_options", "max_tokens", "n", "stop", "logprobs"}
_UNSUPPORTED = frozenset({"presence_penalty", "frequency_penalty", "logit_bias"})
_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
_COMPLETION = _COMMON | _UNSUPPORTED | {"prompt", "echo", "best_of", "suffix"}
_OF_CHAT = frozenset({"tools", "tool_choice", "functions", "function_call", "response_format", "modalities", "audio"})
_CHAT = _COMMON | _UNSUPPORTED | _OF_CHAT | {"messages", "max_completion_tokens", "top_logprobs"}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclasses.dataclass(frozen=True)
class Served:
    """The model that is served.

    Attributes:
      name: by which it is asked for.
      config: its configuration.
      tokenizer: its tokenizer.
      capacity: most tokens of a request, prompt and continuation.
    """

    name: str
    config: Any
    tokenizer: "PreTrainedTokenizerBase"
    capacity: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a call asks for.

    Attributes:
      chat: whether a conversation is to be answered, rather than prompts continued.
      requests: one for each choice: the choices of the first prompt, those of the second, ...
      prompt_tokens: of all prompts, each counted once.
      stop: strings that stop a text.
      streamed: whether pieces are wanted as they come.
      usage: whether the number of tokens is wanted at the end of these.
      counted: whether it is wanted with each of them, so far.
    """

    chat: bool
    requests: tuple[Request, ...]
    prompt_tokens: int
    stop: tuple[str, ...]
    streamed: bool
    usage: bool
    counted: bool = False


def completion_of(body: object, served: Served) -> Asked:
    """What the body of ``/v1/completions`` asks for.

    Raises:
      ApiError: naming the field that cannot be served.
    """
    fields = Fields(body, _COMPLETION, _IGNORED)
    _check_model(fields, served)
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    fields.refuse("echo", False)
    fields.refuse("suffix", "")
    fields.refuse("best_of", n)
    prompts = [_prompt_ids(prompt, served) for prompt in _prompts(fields.get("prompt"))]
    logprobs = fields.whole("logprobs", None, 0, MOST_LOGPROBS)
    return _asked(fields, prompts, n, logprobs, lambda ids: fields.whole("max_tokens", COMPLETION_TOKENS, 1), False)


def chat_of(body: object, served: Served) -> Asked:
    """What the body of ``/v1/chat/completions`` asks for.

    Raises:
      ApiError: naming the field that cannot be served.
    """
    fields = Fields(body, _CHAT, _IGNORED)
    _check_model(fields, served)
    for name in ("tools", "functions"):
        fields.refuse(name, [])
    fields.refuse("tool_choice", "none", "auto")
    fields.refuse("function_call", "none", "auto")
    fields.refuse("response_format", {"type": "text"})
    fields.refuse("modalities", ["text"])
    fields.refuse("audio")
    reports, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not reports:
        raise ApiError(400, "top_logprobs: expected with logprobs true", param="top_logprobs")
    if not has_template(served.tokenizer):
        raise ApiError(
            400, "the model's tokenizer has no chat template; expected a chat model, or a call of /v1/completions"
        )
    messages = _messages(fields.get("messages"))
    try:
        ids = chat_prompt(served.tokenizer, messages)
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from None

    def limit(ids: list[int]) -> int:
        given = fields.whole("max_completion_tokens", None, 1) or fields.whole("max_tokens", None, 1)
        return given or max(served.capacity - len(ids), 1)

    return _asked(fields, [ids], fields.whole("n", 1, 1, MOST_CHOICES), top if reports else None, limit, True)


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.get("model")
    if name is not None and name != served.name:
        raise ApiError(
            404, f"model {shown(name)}: not served here; expected {served.name!r}", "model", "model_not_found"
        )


def _asked(
    fields: Fields,
    prompts: list[list[int]],
    n: int,
    logprobs: int | None,
    limit: Callable[[list[int]], int],
    chat: bool,
) -> Asked:
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts, n {n}: expected at most {MOST_CHOICES} continuations", param="n")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse(name, 0, 0.0)
    fields.refuse("logit_bias", {})
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise ApiError(400, f"stream_options {shown(options)}: expected an object", param="stream_options")
    known = frozenset({"include_usage", "continuous_usage_stats"})
    stream_options = Fields(options or {}, known, frozenset({"include_obfuscation"}))
    settings = {
        "temperature": fields.number("temperature", 1.0),
        "top_p": fields.number("top_p", 1.0),
        "top_k": max(fields.whole("top_k", 0, -1), 0),  # -1 means all tokens to other servers.
        "min_p": fields.number("min_p", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
    }
    seed = fields.whole("seed", None, None, None)
    seed = secrets.randbits(32) if seed is None else seed
    requests = tuple(
        Request(prompt=ids, max_new_tokens=limit(ids), logprobs=logprobs, seed=seed + i, **settings)
        for ids in prompts
        for i in range(n)
    )
    asked = Asked(
        chat=chat,
        requests=requests,
        prompt_tokens=sum(map(len, prompts)),
        stop=fields.stops(),
        streamed=fields.flag("stream"),
        usage=stream_options.flag("include_usage"),
        counted=stream_options.flag("include_usage") and stream_options.flag("continuous_usage_stats"),
    )
    try:
        requests[0].check()
    except InputError as error:
        raise ApiError(400, str(error), param=str(error).split()[0].rstrip(":")) from None
    return asked


def _prompts(given: object) -> list[object]:
    """The prompts of a completion, each a text or token ids."""
    if given is None:
        raise ApiError(400, "prompt: missing; expected a text, token ids, or a list of these", param="prompt")
    if isinstance(given, list) and given and not _is_ids(given):
        return given
    return [given]


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)


def _prompt_ids(prompt: object, served: Served) -> list[int]:
    if isinstance(prompt, list) and prompt and _is_ids(prompt):
        return prompt
    if not isinstance(prompt, str):
        expected = "expected a text, token ids, or a list of these"
        raise ApiError(400, f"prompt {shown(prompt)}: {expected}", param="prompt")
    try:
        return encode_prompt(served.tokenizer, served.config, prompt)
    except InputError as error:
        raise ApiError(400, str(error), param="prompt") from None


def _messages(given: object) -> list[dict[str, str]]:
    """A conversation as chat templates take it, contents as texts."""
    if not isinstance(given, list) or not given:
        raise ApiError(400, "messages: expected a list of messages, at least one", param="messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(given)]


def _message(name: str, message: object) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ApiError(400, f"{name}: expected an object with role and content", param="messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(400, f"{name}: role {shown(role)}; expected one of {', '.join(_ROLES)}", param="messages")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise ApiError(400, f"{name}: content {shown(content)}; expected text", param="messages")
    return {"role": _ROLES[role], "content": "".join(part["text"] for part in parts)}
