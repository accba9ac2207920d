"""Qwen3 with experts: many small ones in place of the MLP, in all layers or some."""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, cast

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import read_config
from fqjax.models.experts import ExpertsConfig, read_experts
from fqjax.models.hf_config import sizes
from fqjax.models.mistral import one_window
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(ExpertsConfig):
    """Sizes and constants of a Qwen3 model with experts."""

    qk_norm: ClassVar[bool] = True


class Qwen3Moe(Decoder):
    """A Qwen3 language model with experts; arguments as for :class:`fqjax.models.decoder.Decoder`."""

    keep_in_float = (*Decoder.keep_in_float, r"\.mlp\.gate$")


def config_from_hf(hf: JsonMapping) -> Qwen3MoeConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    dense = tuple(cast(Iterable[object], hf.get("mlp_only_layers") or ()))
    for layer in dense:
        if type(layer) is not int or not 0 <= layer < cast(int, hf["num_hidden_layers"]):
            raise InputError(f"config.json: mlp_only_layers has {layer!r}: expected numbers of layers")
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return read_config(
        Qwen3MoeConfig,
        hf,
        **one_window(hf, window, "Qwen3-MoE"),
        **read_experts(hf),
        **sizes(hf, "moe_intermediate_size", "decoder_sparse_step"),
        mlp_only_layers=dense,
        norm_topk_prob=bool(hf.get("norm_topk_prob")),
        attention_bias=bool(hf.get("attention_bias")),
    )
