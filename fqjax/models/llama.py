"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Query, key and value projections are one linear layer (``qkv_proj``), and so are gate and up (``gate_up_proj``): they read
the same input, which is then quantized once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from fqjax.equalize import ScalingPath
from fqjax.errors import InputError
from fqjax.models.attention import attend, rotate
from fqjax.models.cache import KeyValueCache, LayerCache
from fqjax.models.causal_lm import CausalLM, eos_ids, unembed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and constants of a Llama model, named as in Hugging Face configurations.

    ``rope_scaling`` holds the entries of a "llama3" or "linear" scaling as sorted pairs; empty for none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model can take; rotary positions set no limit."""
        return None

    def rotary_frequencies(self) -> Float32[Array, " half"]:
        """Angle per position of each pair of channels, after the configuration's scaling."""
        exponent = jnp.arange(0, self.head_dim, 2, dtype=jnp.float32) / self.head_dim
        inverse = self.rope_theta**-exponent
        scaling = dict(self.rope_scaling)
        kind = scaling.get("rope_type", "default")
        if kind == "linear":
            return inverse / scaling["factor"]
        if kind == "llama3":
            return _llama3_frequencies(inverse, **{k: v for k, v in scaling.items() if k != "rope_type"})
        return inverse


def _llama3_frequencies(
    inverse: Float32[Array, " half"],
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Float32[Array, " half"]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inverse
    turns = original_max_position_embeddings / wavelength
    blend = jnp.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class LlamaAttention(nnx.Module):
    """Self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        make = _linear_maker(c.attention_bias, dtype, rngs)
        self.qkv_proj = make(c.hidden_size, width)
        self.o_proj = make(self.heads * self.head_dim, c.hidden_size)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        positions: Int32[Array, "..."],
        frequencies: Float32[Array, " half"],
    ) -> tuple[Float[Array, "batch length hidden"], LayerCache | None]:
        qkv = self.qkv_proj(x).reshape(*x.shape[:2], -1, self.head_dim)
        q, k, v = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        out, cache = attend(q, k, v, cache, lengths)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


class LlamaMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = _linear_maker(config.mlp_bias, dtype, rngs)
        self.gate_up_proj = make(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = make(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(jax.nn.silu(gate) * up)


class LlamaLayer(nnx.Module):
    """Attention and MLP, each behind a norm and beside a residual connection."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = _norm(config, dtype, rngs)
        self.self_attn = LlamaAttention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = _norm(config, dtype, rngs)
        self.mlp = LlamaMLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        positions: Int32[Array, "..."],
        frequencies: Float32[Array, " half"],
    ) -> tuple[Float[Array, "batch length hidden"], LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), cache, lengths, positions, frequencies)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(CausalLM):
    """A Llama language model.

    Args:
      config: sizes and constants.
      dtype: dtype of parameters and activations; norms, softmax and logits are computed in float32.
      rngs: seeds the initial parameters.
    """

    keep_in_float = (r"^lm_head$",)

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, dtype, rngs)
        if not config.tie_word_embeddings:
            self.lm_head = _linear_maker(False, dtype, rngs)(config.hidden_size, config.vocab_size)

    def begin(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "batch length hidden"], tuple[Any, ...]]:
        length = tokens.shape[1]
        positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.positions(length)
        return self.embed_tokens(tokens), (positions, self.config.rotary_frequencies())

    def final_norm(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        return self.norm(hidden)

    def head(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        if self.config.tie_word_embeddings:
            return unembed(hidden, self.embed_tokens.embedding[...])
        return unembed(hidden, self.lm_head.kernel[...].T)

    def scaling_paths(self) -> list[ScalingPath]:
        """Values scale through attention to ``o_proj``, the up projection through its gate to ``down_proj``."""
        c = self.config
        # Input channel (h, d) of o_proj reads channel d of the value head that query head h shares.
        heads = np.arange(c.num_attention_heads) // (c.num_attention_heads // c.num_key_value_heads)
        first_value = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
        values = first_value + (heads[:, None] * c.head_dim + np.arange(c.head_dim)).reshape(-1)
        up = c.intermediate_size + np.arange(c.intermediate_size)
        paths = []
        for i in range(c.num_hidden_layers):
            attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
            paths.append(ScalingPath(f"{attention}.qkv_proj", f"{attention}.o_proj", values))
            paths.append(ScalingPath(f"{mlp}.gate_up_proj", f"{mlp}.down_proj", up))
        return paths

    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        c = self.config
        return KeyValueCache.create(c.num_hidden_layers, batch, capacity, c.num_key_value_heads, c.head_dim, self.dtype)


def _norm(config: LlamaConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _linear_maker(bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> Any:
    def make(inputs: int, outputs: int) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

    return make


def config_from_hf(hf: dict[str, Any]) -> LlamaConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    if hf["hidden_act"] != "silu":
        raise InputError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported for Llama; expected 'silu'")
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"config.json: rope_type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    theta = rope.pop("rope_theta", hf.get("rope_theta") or 10000.0)
    try:
        scaling = {key: rope[key] for key in ROPE_TYPES[kind]}
    except KeyError as error:
        raise InputError(f"config.json: rope_type {kind!r} needs {error}") from None
    heads = hf["num_attention_heads"]
    return LlamaConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_hidden_layers=hf["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_position_embeddings=hf["max_position_embeddings"],
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=float(theta),
        rope_scaling=tuple(sorted({"rope_type": kind, **scaling}.items())) if kind != "default" else (),
        attention_bias=bool(hf.get("attention_bias")),
        mlp_bias=bool(hf.get("mlp_bias")),
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=eos_ids(hf),
    )
