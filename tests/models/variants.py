"""Small random models of every variant of every family, as Hugging Face checkpoints without a file of weights.

A variant's weights are drawn from the checksum of each tensor's name, so that any program can make them again.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

RECORDED = Path(__file__).parent / "data" / "parity.npz"
"""Logits of transformers' torch models, written by scripts/record_parity_logits.py."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = _LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
_QWEN2 = _MISTRAL | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = _MISTRAL | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
_QWEN3_MOE = _QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
_YARN_OPTIONS = {"beta_fast": 2.0, "beta_slow": 0.5, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.3}

VARIANTS: dict[str, dict] = {
    "llama": _LLAMA,
    "llama-grouped": _LLAMA | {"num_key_value_heads": 2},
    "llama-one-kv-head": _LLAMA | {"num_key_value_heads": 1},
    "llama-tied": _LLAMA | {"tie_word_embeddings": True},
    "llama-attention-bias": _LLAMA | {"attention_bias": True, "num_key_value_heads": 2},
    "llama-mlp-bias": _LLAMA | {"mlp_bias": True},
    "llama-head-dim": _LLAMA | {"head_dim": 16, "num_key_value_heads": 2},
    "llama-theta": _LLAMA | {"rope_theta": 500.0},
    "llama-rope-linear": _LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-rope-llama3": _LLAMA | {"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 16}},
    "llama-rope-yarn": _LLAMA | {"rope_parameters": _YARN},
    "mistral": _MISTRAL | {"sliding_window": None, "head_dim": 16},
    "mistral-window": _MISTRAL | {"sliding_window": 5, "tie_word_embeddings": True},
    "qwen2": _QWEN2 | {"tie_word_embeddings": True},
    "qwen2-window": _QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": _QWEN3 | {"rope_parameters": _YARN | _YARN_OPTIONS},
    "qwen3-window": _QWEN3
    | {
        "head_dim": 12,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "rope_theta": 100.0},
    },
    "mixtral": _MIXTRAL | {"head_dim": 16},
    "mixtral-window": _MIXTRAL | {"sliding_window": 5, "tie_word_embeddings": True, "num_local_experts": 5},
    "mixtral-one": _MIXTRAL | {"num_experts_per_tok": 1},
    "mixtral-all": _MIXTRAL | {"num_experts_per_tok": 4},
    "qwen3-moe": _QWEN3_MOE,
    "qwen3-moe-raw-weights": _QWEN3_MOE
    | {"norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3-moe-window": _QWEN3_MOE | {"use_sliding_window": True, "sliding_window": 3, "num_experts_per_tok": 1},
    "qwen3-moe-step": _QWEN3_MOE | {"decoder_sparse_step": 2, "num_hidden_layers": 3},
    "qwen3-moe-mlp-only": _QWEN3_MOE | {"mlp_only_layers": [0]},
    "opt": _OPT,
    "opt-350m": _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "opt-post-norm": _OPT | {"do_layer_norm_before": False},
    "opt-projections": _OPT | {"word_embed_proj_dim": 32},
    "opt-no-bias": _OPT | {"enable_bias": False},
    "opt-plain-norms": _OPT | {"layer_norm_elementwise_affine": False},
    "opt-no-final-norm": _OPT | {"_remove_final_layer_norm": True},
    "opt-gelu": _OPT | {"activation_function": "gelu"},
    "opt-untied": _OPT | {"tie_word_embeddings": False},
}


def tokens() -> np.ndarray:
    """The input that logits are recorded for, int32 (2, 24)."""
    return np.random.default_rng(7).integers(3, 64, (2, 24)).astype(np.int32)


def logits(model, ids=None):
    """What a model gives for ids, by default :func:`tokens`: one program, compiled sooner than its operations."""
    return nnx.jit(lambda model, ids: model(ids))(model, tokens() if ids is None else ids)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Float32 weights by tensor name; norms near one, so that no activation vanishes or explodes."""
    out = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        noise = rng.standard_normal(shape).astype(np.float32)
        norm = "norm" in name and name.endswith("weight")
        out[name] = 1 + 0.2 * noise if norm else 0.2 * noise
    return out


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a variant's tensors, as transformers writes them."""
    return _opt_shapes(config) if config["model_type"] == "opt" else _decoder_shapes(config)


def write_checkpoint(directory: Path, config: dict) -> Path:
    """Writes a variant as a Hugging Face directory in float32, without a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(tensor_shapes(config)), directory / "model.safetensors")
    return directory


def _decoder_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    d, v = c["hidden_size"], c["vocab_size"]
    head = c.get("head_dim", d // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    qkv_bias = c.get("attention_bias") or c["model_type"] == "qwen2"
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for name, (n, k), bias in (
            ("self_attn.q_proj", (q, d), qkv_bias),
            ("self_attn.k_proj", (kv, d), qkv_bias),
            ("self_attn.v_proj", (kv, d), qkv_bias),
            ("self_attn.o_proj", (d, q), c.get("attention_bias")),
            *_mlp_shapes(c, i),
        ):
            shapes[f"{prefix}{name}.weight"] = (n, k)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (n,)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (d,)
        if c["model_type"].startswith("qwen3"):
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head,)
    return shapes


def _mlp_shapes(c: dict, layer: int) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """Name, shape and whether there is a bias, of the linears of a layer's MLP or experts."""
    d, f, bias = c["hidden_size"], c["intermediate_size"], c.get("mlp_bias", False)
    if c["model_type"] == "mixtral":
        yield "block_sparse_moe.gate", (c["num_local_experts"], d), False
        for e in range(c["num_local_experts"]):
            for name, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d))):
                yield f"block_sparse_moe.experts.{e}.{name}", shape, False
        return
    paths = ["mlp"]
    if (
        "num_experts" in c
        and layer not in c.get("mlp_only_layers", [])
        and not (layer + 1) % c.get("decoder_sparse_step", 1)
    ):
        yield "mlp.gate", (c["num_experts"], d), False
        f, paths = c["moe_intermediate_size"], [f"mlp.experts.{e}" for e in range(c["num_experts"])]
    for path in paths:
        for name, shape in (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f))):
            yield f"{path}.{name}", shape, bias


def _opt_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    d, f, v, e = c["hidden_size"], c["ffn_dim"], c["vocab_size"], c["word_embed_proj_dim"]
    prefix, bias, affine = "model.decoder.", c.get("enable_bias", True), c.get("layer_norm_elementwise_affine", True)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (v, e),
        f"{prefix}embed_positions.weight": (c["max_position_embeddings"] + 2, d),
    }
    if e != d:
        shapes[f"{prefix}project_in.weight"], shapes[f"{prefix}project_out.weight"] = (d, e), (e, d)
    if not c.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (v, e)
    norms = []
    if c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm"):
        norms.append("final_layer_norm")
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}layers.{i}."
        linears = {f"self_attn.{x}": (d, d) for x in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, (n, k) in (linears | {"fc1": (f, d), "fc2": (d, f)}).items():
            shapes[f"{layer}{name}.weight"] = (n, k)
            if bias:
                shapes[f"{layer}{name}.bias"] = (n,)
        norms += [f"layers.{i}.self_attn_layer_norm", f"layers.{i}.final_layer_norm"]
    for norm in norms if affine else ():
        shapes[f"{prefix}{norm}.weight"] = shapes[f"{prefix}{norm}.bias"] = (d,)
    return shapes
