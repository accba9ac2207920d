"""Qwen3, the dense models: a norm over each head of queries and keys, and windows as in Qwen2."""

import dataclasses
from typing import ClassVar

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import DecoderConfig, read_config
from fqjax.models.qwen2 import upper_windows
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Sizes and constants of a Qwen3 model."""

    qk_norm: ClassVar[bool] = True


class Qwen3(Decoder):
    """A Qwen3 language model; arguments as for :class:`fqjax.models.decoder.Decoder`."""


def config_from_hf(hf: JsonMapping) -> Qwen3Config:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    return read_config(Qwen3Config, hf, attention_bias=bool(hf.get("attention_bias")), **upper_windows(hf))
