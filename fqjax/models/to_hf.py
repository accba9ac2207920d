"""From a model of fqjax back to Hugging Face: the configuration, and the parts of concatenated layers."""

import dataclasses
from typing import cast

import jax.numpy as jnp
from jaxtyping import DTypeLike

from fqjax.models import FAMILIES
from fqjax.models.decoder_config import DecoderConfig
from fqjax.models.experts import ExpertsConfig
from fqjax.models.opt import OPTConfig


def config_to_hf(architecture: str, config: DecoderConfig | OPTConfig, dtype: DTypeLike) -> dict[str, object]:
    """The content of config.json, from which ``config_from_hf`` of the same family reads ``config`` again.

    Args:
      architecture: name in :data:`fqjax.models.FAMILIES`.
      config: the family's configuration.
      dtype: of the model's parameters.
    """
    family = FAMILIES[architecture]
    entries: dict[str, object] = {key: _plain(value) for key, value in dataclasses.asdict(config).items()}
    entries |= {"architectures": [architecture], "model_type": family.model_type, "torch_dtype": jnp.dtype(dtype).name}
    if isinstance(config, OPTConfig):
        entries["_remove_final_layer_norm"] = entries.pop("remove_final_layer_norm")
    if isinstance(config, DecoderConfig):
        entries = _of_decoder(entries, config, family.model_type)
    if family.config_to_hf is None:
        return entries
    own = family.config_to_hf(config)
    return {key: value for key, value in (entries | dict(own)).items() if key not in own or value is not None}


def _of_decoder(entries: dict[str, object], config: DecoderConfig, kind: str) -> dict[str, object]:
    """A decoder's entries with the names and the forms that Hugging Face has for them."""
    entries["hidden_act"] = "silu"
    scaling = dict(config.rope_scaling)
    theta = entries.pop("rope_theta")
    # transformers 5 reads the first, earlier versions and other programs the other two.
    entries["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": theta}
    entries |= {"rope_theta": theta, "rope_scaling": scaling or None}
    if kind.startswith("qwen"):
        entries["use_sliding_window"] = entries["sliding_window"] is not None
    if not entries["layer_types"] or kind in ("mistral", "mixtral", "qwen3_moe"):
        del entries["layer_types"]
    if kind == "mixtral":
        own = ("num_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob")
        return {key: value for key, value in entries.items() if key not in own} | {
            "num_local_experts": cast(ExpertsConfig, config).num_experts
        }
    return entries


def part_sizes(config: DecoderConfig | OPTConfig, parts: int, outputs: int) -> tuple[int, ...]:
    """Output channels of each part of a layer.

    Args:
      config: the family's configuration.
      parts: how many it consists of in a checkpoint.
      outputs: of the whole layer.
    """
    if parts == 3 and isinstance(config, DecoderConfig):
        values = config.num_key_value_heads * config.head_dim
        return outputs - 2 * values, values, values
    return (outputs // parts,) * parts


def _plain(value: object) -> object:
    """Tuples as the lists that JSON has."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
