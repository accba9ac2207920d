"""The decoder that Llama introduced and other families vary: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Query, key and value projections are one linear layer (``qkv_proj``), and so are gate and up (``gate_up_proj``): they read
the same input, which is then quantized once.  What a family varies stands in its :class:`DecoderConfig`.
"""

from collections.abc import Iterator
from typing import cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from fqjax.layers.head import unembed
from fqjax.models.alike import each
from fqjax.models.cache import KeyValueCache, LayerCache
from fqjax.models.causal_lm import Block, CausalLM
from fqjax.models.decoder_config import DecoderConfig
from fqjax.models.experts import ExpertsConfig, mixture
from fqjax.models.fused import after_attention, after_norm, gated
from fqjax.models.rotary import Rotation, rotation
from fqjax.models.sites import Heads, Norm, Rows, Site


class Attention(nnx.Module):
    """Self-attention with rotary positions; over a window where ``window`` is not None."""

    def __init__(self, config: DecoderConfig, window: int | None, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c, self.window = config, window
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = _linear(c.hidden_size, width, c.qkv_bias, dtype, rngs)
        self.o_proj = _linear(self.heads * self.head_dim, c.hidden_size, c.attention_bias, dtype, rngs)
        self.normalizes = c.qk_norm
        if self.normalizes:
            self.q_norm, self.k_norm = (_norm(c.head_dim, c.rms_norm_eps, dtype, rngs) for _ in range(2))

    def __call__(
        self,
        norm: nnx.RMSNorm,
        x: Float[Array, "batch length hidden"],
        pending: Float[Array, "batch length hidden"] | None,
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        rotation: Rotation,
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"], LayerCache | None]:
        """Attention's addition to the stream ``x + pending``, which the norm reads, that stream, and the cache."""
        qkv, x = after_norm(self.qkv_proj, norm, x, pending)
        qkv = qkv.reshape(*x.shape[:2], -1, self.head_dim)
        if self.normalizes:
            q, k, v = jnp.split(qkv, [self.heads, self.heads + self.kv_heads], axis=2)
            qkv = jnp.concatenate([self.q_norm(q), self.k_norm(k), v], axis=2)
        out, cache = after_attention(
            self.o_proj, qkv, self.kv_heads, cache, lengths, rotation=rotation, window=self.window
        )
        return out, x, cache


class MLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.gate_up_proj = _linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias, dtype, rngs)
        self.down_proj = _linear(c.intermediate_size, c.hidden_size, c.mlp_bias, dtype, rngs)

    def __call__(
        self, norm: nnx.RMSNorm, x: Float[Array, "... hidden"], pending: Float[Array, "... hidden"] | None
    ) -> tuple[Float[Array, "... hidden"], Float[Array, "... hidden"]]:
        """The MLP's addition to the stream ``x + pending``, which the norm reads, and that stream."""
        return gated(self.gate_up_proj, self.down_proj, norm, x, pending, "silu")


class Layer(Block):
    """Attention and MLP, each after a norm and beside a residual connection."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        self.input_layernorm = _norm(c.hidden_size, c.rms_norm_eps, dtype, rngs)
        self.self_attn = Attention(c, c.window(index), dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = _norm(c.hidden_size, c.rms_norm_eps, dtype, rngs)
        if c.has_experts(index):
            self.mlp = mixture(cast(ExpertsConfig, c), dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(c, dtype=dtype, rngs=rngs)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "batch length hidden"],
        pending: Float[Array, "batch length hidden"] | None,
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
        rotation: Rotation,
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"], LayerCache | None]:
        attended, x, cache = self.self_attn(self.input_layernorm, x, pending, cache, lengths, rotation)
        if isinstance(self.mlp, MLP):
            fed, x = self.mlp(self.post_attention_layernorm, x, attended)
        else:  # The router of a mixture of experts reads what the norm gives.
            x = x + attended
            fed = self.mlp(self.post_attention_layernorm(x))
        return x, fed, cache


class Decoder(CausalLM):
    """Base of the families with this architecture.

    Args:
      config: sizes and constants.
      dtype: dtype of parameters and activations; norms, softmax and logits are computed in float32.
      rngs: seeds the initial parameters.
    """

    keep_in_float = (r"^lm_head$",)

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = c, jnp.dtype(dtype)
        self.embed_tokens = nnx.Embed(c.vocab_size, c.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        kinds = [(c.window(i), c.has_experts(i)) for i in range(c.num_hidden_layers)]
        self.layers = each(lambda i: Layer(c, i, dtype=dtype, rngs=rngs), kinds)
        self.norm = _norm(c.hidden_size, c.rms_norm_eps, dtype, rngs)
        if not c.tie_word_embeddings:
            self.lm_head = _linear(c.hidden_size, c.vocab_size, False, dtype, rngs)

    def begin(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "batch length hidden"], tuple[Rotation]]:
        c, length = self.config, tokens.shape[1]
        positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.positions(length)
        return self.embed_tokens(tokens), (rotation(positions, c.head_dim, c.rope_theta, dict(c.rope_scaling)),)

    def final_norm(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        return self.norm(hidden)

    def head(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        return unembed(hidden, getattr(self, self.head_name))

    def sites(self) -> list[Site]:
        """The places where linear layers read something (:mod:`fqjax.models.sites`)."""
        head = [] if self.config.tie_word_embeddings else [Site(("lm_head",), Norm("norm"))]
        return [*self._sites_of_attention(), *self._sites_of_mlps(), *head]

    def _sites_of_attention(self) -> Iterator[Site]:
        """Norms before ``qkv_proj``; values scale through attention to ``o_proj``."""
        c = self.config
        heads = Heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        # Input channel (h, d) of o_proj reads channel d of the value head that query head h shares.
        shared = np.arange(heads.query) // (heads.query // heads.key_value)
        first_value = (heads.query + heads.key_value) * heads.dim
        values = first_value + (shared[:, None] * heads.dim + np.arange(heads.dim)).reshape(-1)
        for i in range(c.num_hidden_layers):
            attention = f"layers.{i}.self_attn"
            yield Site((f"{attention}.qkv_proj",), Norm(f"layers.{i}.input_layernorm"))
            yield Site((f"{attention}.o_proj",), Rows(f"{attention}.qkv_proj", values), heads)

    def _sites_of_mlps(self) -> Iterator[Site]:
        """Norms before gate and up, which experts share with the router; up scales through its gate to ``down_proj``."""
        for i in range(self.config.num_hidden_layers):
            mlps = {f"layers.{i}.{mlp}": size for mlp, size in self.config.mlps(i).items()}
            router = [f"layers.{i}.mlp.gate"] if self.config.has_experts(i) else []
            readers = (*(f"{mlp}.gate_up_proj" for mlp in mlps), *router)
            yield Site(readers, Norm(f"layers.{i}.post_attention_layernorm"))
            for mlp, size in mlps.items():
                yield Site((f"{mlp}.down_proj",), Rows(f"{mlp}.gate_up_proj", size + np.arange(size)))

    def make_cache(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> KeyValueCache:
        c = self.config
        return KeyValueCache.create(
            c.num_hidden_layers,
            batch,
            capacity,
            c.num_key_value_heads,
            c.head_dim,
            self.dtype if dtype is None else dtype,
        )


def _norm(size: int, epsilon: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _linear(inputs: int, outputs: int, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
