"""Mixtral: Mistral with a mixture of experts in place of every MLP (arXiv 2401.04088)."""

import dataclasses

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import read_config
from fqjax.models.experts import ExpertsConfig, read_experts
from fqjax.models.mistral import one_window
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(ExpertsConfig):
    """Sizes and constants of a Mixtral model."""


class Mixtral(Decoder):
    """A Mixtral language model; arguments as for :class:`fqjax.models.decoder.Decoder`."""

    keep_in_float = (*Decoder.keep_in_float, r"\.mlp\.gate$")


def config_from_hf(hf: JsonMapping) -> MixtralConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    return read_config(MixtralConfig, hf, **one_window(hf, hf.get("sliding_window"), "Mixtral"), **read_experts(hf))
