"""Qwen2 and Qwen2.5: biases on queries, keys and values alone, and a sliding window on the upper layers if asked for."""

import dataclasses
from typing import cast

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import DecoderConfig, Windows, read_config, read_windows
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """Sizes and constants of a Qwen2 model."""

    @property
    def qkv_bias(self) -> bool:
        return True


class Qwen2(Decoder):
    """A Qwen2 language model; arguments as for :class:`fqjax.models.decoder.Decoder`."""


def config_from_hf(hf: JsonMapping) -> Qwen2Config:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    return read_config(Qwen2Config, hf, **upper_windows(hf))


def upper_windows(hf: JsonMapping) -> Windows:
    """Fields of the window, which ``use_sliding_window`` switches on for layers from ``max_window_layers`` on.

    Raises:
      InputError: as :func:`fqjax.models.decoder_config.read_windows`.
    """
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return read_windows(hf, window, first=cast(int, hf.get("max_window_layers", 0)))
