"""Language models in Flax NNX, one architecture family a file.

:data:`BUILT_IN` is the only list of this package's.  A family's modules carry the names of Hugging Face's tensors, but for
the projections that are concatenated, so reading a checkpoint needs no more than the two entries ``prefixes`` and ``fused``.
"""

from collections.abc import Callable, Mapping

from flax import nnx

from fqjax.models import llama, mistral, mixtral, opt, qwen2, qwen3, qwen3_moe
from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import DecoderConfig
from fqjax.models.family import Families, Family, register_family
from fqjax.runtime.files import JsonMapping

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
    architecture: str,
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
        architecture=architecture,
        model_type=model_type,
        model=model,
        config=config,
        config_from_hf=config_from_hf,
        prefixes=("model.",),
        fused={**_QKV, **_GATE_UP, **fused},
        stacked=dict(stacked),
        renamed=dict(renamed),
    )


BUILT_IN = (
    _decoder("LlamaForCausalLM", "llama", llama.Llama, llama.LlamaConfig, llama.config_from_hf),
    _decoder("MistralForCausalLM", "mistral", mistral.Mistral, mistral.MistralConfig, mistral.config_from_hf),
    _decoder("Qwen2ForCausalLM", "qwen2", qwen2.Qwen2, qwen2.Qwen2Config, qwen2.config_from_hf),
    _decoder("Qwen3ForCausalLM", "qwen3", qwen3.Qwen3, qwen3.Qwen3Config, qwen3.config_from_hf),
    _decoder(
        "MixtralForCausalLM",
        "mixtral",
        mixtral.Mixtral,
        mixtral.MixtralConfig,
        mixtral.config_from_hf,
        _MIXTRAL,
        _STACKED,
        _MIXTRAL_RENAMED,
    ),
    _decoder(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        qwen3_moe.Qwen3Moe,
        qwen3_moe.Qwen3MoeConfig,
        qwen3_moe.config_from_hf,
        _EXPERTS,
        _STACKED,
    ),
    Family(
        architecture="OPTForCausalLM",
        model_type="opt",
        model=opt.OPT,
        config=opt.OPTConfig,
        config_from_hf=opt.config_from_hf,
        prefixes=("model.decoder.", "decoder."),
        fused=_QKV,
    ),
)
"""This package's families."""

for _family in BUILT_IN:
    register_family(_family)

FAMILIES = Families()
"""All families, by the name that Hugging Face configurations give under "architectures"."""


def architecture_of(model: nnx.Module) -> str | None:
    """The name under which a bundled model is registered; None for any other module."""
    return next((name for name, family in FAMILIES.items() if type(model) is family.model), None)
