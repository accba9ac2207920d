"""Language models in Flax NNX, one architecture family a file.

:data:`FAMILIES` is the only list of them.  A family's modules carry the names of Hugging Face's tensors, but for the
projections that are concatenated, so reading a checkpoint needs no more than the two entries ``prefix`` and ``fused``.
"""

import dataclasses
from collections.abc import Callable, Mapping

from flax import nnx

from fqjax.models import llama, mistral, mixtral, opt, qwen2, qwen3, qwen3_moe
from fqjax.models.causal_lm import CausalLM
from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import DecoderConfig
from fqjax.models.opt import OPTConfig
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture is built and read.

    Attributes:
      model_type: the name that Hugging Face configurations give under "model_type".
      model: the model's class; called as ``model(config, dtype=..., rngs=...)``.
      config: the configuration's class, a frozen dataclass of JSON values.
      config_from_hf: from a Hugging Face configuration to ``config``.
      prefixes: what checkpoints put before the names of all tensors but the head's; the first is written, and others that a
        checkpoint has are found by its embedding.
      fused: modules of a block that are several in the checkpoint, concatenated along the output axis, or that have another
        name there; ``*`` stands for a number.
      renamed: further names of such modules that some checkpoints have.
      stacked: modules that in some checkpoints are a part of one tensor, along its first axis, with that tensor's name; ``*``
        stands for the number of the part.  Others that such checkpoints name otherwise.
    """

    model_type: str
    model: Callable[..., CausalLM]
    config: type[DecoderConfig | OPTConfig]
    config_from_hf: Callable[[JsonMapping], DecoderConfig | OPTConfig]
    prefixes: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]
    renamed: dict[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    stacked: dict[str, str] = dataclasses.field(default_factory=dict)


_QKV = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


_EXPERTS = {"mlp.experts.*.gate_up_proj": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")}
_MIXTRAL = {
    "mlp.gate": ("block_sparse_moe.gate",),
    "mlp.experts.*.gate_up_proj": ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
    "mlp.experts.*.down_proj": ("block_sparse_moe.experts.*.w2",),
}
_MIXTRAL_RENAMED = {
    "mlp.gate": (("mlp.gate",),),
    "mlp.experts.*.gate_up_proj": (
        ("block_sparse_moe.experts.*.gate_proj", "block_sparse_moe.experts.*.up_proj"),
        ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ("mlp.experts.*.w1", "mlp.experts.*.w3"),
    ),
    "mlp.experts.*.down_proj": (
        ("block_sparse_moe.experts.*.down_proj",),
        ("mlp.experts.*.down_proj",),
        ("mlp.experts.*.w2",),
    ),
}
_STACKED = {
    "mlp.experts.*.gate_up_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.*.down_proj": "mlp.experts.down_proj",
    "mlp.gate": "mlp.gate.weight",
}


def _decoder(
    model_type: str,
    model: type[Decoder],
    config: type[DecoderConfig],
    config_from_hf: Callable[[JsonMapping], DecoderConfig],
    fused: Mapping[str, tuple[str, ...]] = {},
    stacked: Mapping[str, str] = {},
    renamed: Mapping[str, tuple[tuple[str, ...], ...]] = {},
) -> Family:
    """A family on :mod:`fqjax.models.decoder`, whose tensors have the same names but for those of experts."""
    return Family(
        model_type=model_type,
        model=model,
        config=config,
        config_from_hf=config_from_hf,
        prefixes=("model.",),
        fused={**_QKV, **_GATE_UP, **fused},
        stacked=dict(stacked),
        renamed=dict(renamed),
    )


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": _decoder("llama", llama.Llama, llama.LlamaConfig, llama.config_from_hf),
    "MistralForCausalLM": _decoder("mistral", mistral.Mistral, mistral.MistralConfig, mistral.config_from_hf),
    "Qwen2ForCausalLM": _decoder("qwen2", qwen2.Qwen2, qwen2.Qwen2Config, qwen2.config_from_hf),
    "Qwen3ForCausalLM": _decoder("qwen3", qwen3.Qwen3, qwen3.Qwen3Config, qwen3.config_from_hf),
    "MixtralForCausalLM": _decoder(
        "mixtral", mixtral.Mixtral, mixtral.MixtralConfig, mixtral.config_from_hf, _MIXTRAL, _STACKED, _MIXTRAL_RENAMED
    ),
    "Qwen3MoeForCausalLM": _decoder(
        "qwen3_moe", qwen3_moe.Qwen3Moe, qwen3_moe.Qwen3MoeConfig, qwen3_moe.config_from_hf, _EXPERTS, _STACKED
    ),
    "OPTForCausalLM": Family(
        model_type="opt",
        model=opt.OPT,
        config=opt.OPTConfig,
        config_from_hf=opt.config_from_hf,
        prefixes=("model.decoder.", "decoder."),
        fused=_QKV,
    ),
}
"""Families by the name that Hugging Face configurations give under "architectures"."""


def architecture_of(model: nnx.Module) -> str | None:
    """The name under which a bundled model is registered; None for any other module."""
    return next((name for name, family in FAMILIES.items() if type(model) is family.model), None)
