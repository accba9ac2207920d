"""The tokens that begin and end a text, of which three files speak.

config.json is often what some other model had, or transformers' default.  So a text begins with what the tokenizer puts
before it, or else names as its BOS; and it ends at the tokens of generation_config.json, which chat models have several of,
and at the tokenizer's EOS.  config.json counts where nothing else is known, or where it does not contradict.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from fqjax.checkpoint.fields import ModelConfig
from fqjax.checkpoint.tokenizer import added_before, control_tokens
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject, exists, linked, read_json
from fqjax.runtime.notices import say_once
from fqjax.runtime.validation import TokenId, check_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_FILE = "generation_config.json"

FROM_CONFIG = "_from_model_config"
"""Entry of a generation_config.json that transformers has made of config.json, and that knows no more."""

ConfigT = TypeVar("ConfigT", bound=ModelConfig)


def with_text_tokens(config: ConfigT, directory: Path, tokenizer: "PreTrainedTokenizerBase | None") -> ConfigT:
    """A configuration with the BOS and EOS tokens that the checkpoint's files name together.

    Args:
      config: as it was read from config.json.
      directory: of the checkpoint, with generation_config.json or without.
      tokenizer: of the checkpoint; None where there is none, or it is not needed.

    Raises:
      InputError: naming the entry of generation_config.json that is wrong, or a token that the tokenizer puts before texts
        and the model does not have.
    """
    given = read_json(linked(directory, "config.json"), "configuration")
    generation = _generation(directory)
    bos = _begin(directory, config, given, generation, tokenizer)
    ends = tuple(token for token in _ends(config, given, generation, tokenizer) if 0 <= token < config.vocab_size)
    if given.get("bos_token_id") is not None and bos != config.bos_token_id:
        begin = "no token" if bos is None else f"token {bos}"
        say_once(
            f"{directory}: bos_token_id {config.bos_token_id} of config.json is not the tokenizer's: texts begin with {begin}"
        )
    lost = [token for token in config.eos_token_id if token not in ends]
    if ends and lost and given.get("eos_token_id") is not None:
        say_once(
            f"{directory}: eos_token_id {lost[0]} of config.json is not the tokenizer's: texts end with "
            f"{' or '.join(map(str, ends))}"
        )
    return dataclasses.replace(config, bos_token_id=bos, eos_token_id=ends)  # pyright: ignore


def _generation(directory: Path) -> JsonObject:
    """The content of generation_config.json, checked; empty if there is none."""
    if not exists(directory / GENERATION_FILE):
        return {}
    path = linked(directory, GENERATION_FILE)
    content = read_json(path, "configuration")
    check_value(TokenId | None, content.get("bos_token_id"), str(path), "bos_token_id")
    ends = content.get("eos_token_id")
    if isinstance(ends, list) and not ends:
        raise InputError(f"{path}: eos_token_id: expected a token or a list of tokens, got an empty list")
    check_value(TokenId | tuple[TokenId, ...] | None, ends, str(path), "eos_token_id")
    return content


def _begin(
    where: Path,
    config: ModelConfig,
    given: JsonObject,
    generation: JsonObject,
    tokenizer: "PreTrainedTokenizerBase | None",
) -> int | None:
    own = cast("int | None", generation.get("bos_token_id"))
    named = own if own is not None and FROM_CONFIG not in generation else config.bos_token_id
    if tokenizer is None:
        return named
    added, bos = added_before(tokenizer), cast("int | None", tokenizer.bos_token_id)
    if added:
        first = bos if bos in added else added[-1]
        if first >= config.vocab_size:
            raise InputError(
                f"{where}: its tokenizer begins texts with token {first}, beyond the model's {config.vocab_size}"
            )
        return first
    if bos is not None and bos < config.vocab_size:
        return bos
    # A default of transformers' is no finding, nor is a token that the tokenizer uses for something else.
    found = given.get("bos_token_id") is not None or own is not None
    return named if found and named in control_tokens(tokenizer) else None


def _ends(
    config: ModelConfig, given: JsonObject, generation: JsonObject, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[int, ...]:
    own = cast("list[int] | int | None", generation.get("eos_token_id"))
    found = config.eos_token_id if own is None else tuple(own) if isinstance(own, list) else (own,)
    eos = None if tokenizer is None else cast("int | None", tokenizer.eos_token_id)
    if tokenizer is None or eos is None or eos in found:
        return tuple(dict.fromkeys(found))
    if own is None or FROM_CONFIG in generation:
        # They contradict.  The one may be what another model of the family ends with, or a token of this tokenizer's that
        # is none of an end.
        others = control_tokens(tokenizer) - {*added_before(tokenizer)}
        found = () if own is None and given.get("eos_token_id") is None else tuple(t for t in found if t in others)
    return tuple(dict.fromkeys((*found, eos)))
