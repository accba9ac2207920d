"""Llama 1, 2 and 3: :mod:`fqjax.models.decoder` as it is, with biases where the configuration asks for them."""

import dataclasses

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import DecoderConfig, read_config
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and constants of a Llama model."""


class Llama(Decoder):
    """A Llama language model; arguments as for :class:`fqjax.models.decoder.Decoder`."""


def config_from_hf(hf: JsonMapping) -> LlamaConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    return read_config(
        LlamaConfig, hf, attention_bias=bool(hf.get("attention_bias")), mlp_bias=bool(hf.get("mlp_bias"))
    )
