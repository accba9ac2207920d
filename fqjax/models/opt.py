"""The OPT family: LayerNorm, learned positions, biases, ReLU; with the projections and post-norm of its 350m variant."""

import dataclasses
import functools
from typing import cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, Int32

from fqjax.layers.head import unembed
from fqjax.models.alike import each
from fqjax.models.cache import KeyValueCache, LayerCache
from fqjax.models.causal_lm import Block, CausalLM, eos_ids
from fqjax.models.fused import LinearLayer, after_activation, after_attention, after_norm
from fqjax.models.hf_config import check_choice, check_divides, sizes, token_id
from fqjax.models.sites import Heads, Norm, Rows, Site, Stream
from fqjax.runtime.files import JsonMapping
from fqjax.runtime.validation import LayerCount, PositionCount, Size, TokenId

POSITION_OFFSET = 2
"""OPT's position table starts with two rows that are not positions."""

ACTIVATIONS = ("relu", "gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Sizes and constants of an OPT model, named as in Hugging Face configurations."""

    vocab_size: Size
    hidden_size: Size
    ffn_dim: Size
    num_hidden_layers: LayerCount
    num_attention_heads: Size
    word_embed_proj_dim: Size
    max_position_embeddings: PositionCount
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: TokenId | None = None
    eos_token_id: tuple[TokenId, ...] = ()

    @property
    def max_length(self) -> int | None:
        """Longest sequence the model can take: it has learned no more positions."""
        return self.max_position_embeddings

    @property
    def projects(self) -> bool:
        """Whether embeddings have another width than the layers."""
        return self.word_embed_proj_dim != self.hidden_size


class OPTAttention(nnx.Module):
    """Self-attention, one linear layer for queries, keys and values."""

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.qkv_proj = _linear(config, config.hidden_size, 3 * config.hidden_size, dtype, rngs)
        self.out_proj = _linear(config, config.hidden_size, config.hidden_size, dtype, rngs)

    def __call__(
        self,
        norm: nnx.LayerNorm | None,
        x: Float[Array, "batch length hidden"],
        pending: Float[Array, "batch length hidden"] | None,
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"], LayerCache | None]:
        """The addition to the stream ``x + pending`` that is read (after the norm if any), that stream, and the cache."""
        qkv, x = _project(self.qkv_proj, norm, x, pending)
        batch, length, hidden = x.shape
        qkv = qkv.reshape(batch, length, 3 * self.heads, hidden // self.heads)
        out, cache = after_attention(self.out_proj, qkv, self.heads, cache, lengths)
        return out, x, cache


class OPTLayer(Block):
    """Attention and MLP with residual connections; norms before each of them, or after."""

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm_first = config.do_layer_norm_before
        self.activation = config.activation_function
        self.self_attn_layer_norm = _norm(config, dtype, rngs)
        self.self_attn = OPTAttention(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = _norm(config, dtype, rngs)
        self.fc1 = _linear(config, config.hidden_size, config.ffn_dim, dtype, rngs)
        self.fc2 = _linear(config, config.ffn_dim, config.hidden_size, dtype, rngs)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Array, "batch length hidden"],
        pending: Float[Array, "batch length hidden"] | None,
        cache: LayerCache | None,
        lengths: Int32[Array, " batch"] | None,
    ) -> tuple[Float[Array, "batch length hidden"], Float[Array, "batch length hidden"] | None, LayerCache | None]:
        first, second = self.self_attn_layer_norm, self.final_layer_norm
        before = (first, second) if self.norm_first else (None, None)
        pending, x, cache = self.self_attn(before[0], x, pending, cache, lengths)
        if not self.norm_first:
            x, pending = first(x + pending), None
        inner, x = _project(self.fc1, before[1], x, pending)
        pending = after_activation(self.fc2, inner, self.activation)
        return (x, pending, cache) if self.norm_first else (second(x + pending), None, cache)


class OPT(CausalLM):
    """An OPT language model; arguments as for :class:`fqjax.models.llama.Llama`."""

    keep_in_float = (r"^(lm_head|project_in|project_out)$",)

    def __init__(self, config: OPTConfig, *, dtype: DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        c = config
        self.config, self.dtype = config, jnp.dtype(dtype)
        embed = functools.partial(nnx.Embed, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.embed_tokens = embed(c.vocab_size, c.word_embed_proj_dim)
        self.embed_positions = embed(c.max_position_embeddings + POSITION_OFFSET, c.hidden_size)
        self.layers = each(lambda _: OPTLayer(c, dtype=dtype, rngs=rngs), [None] * c.num_hidden_layers)
        bare = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        if c.projects:
            self.project_in = bare(c.word_embed_proj_dim, c.hidden_size)
            self.project_out = bare(c.hidden_size, c.word_embed_proj_dim)
        self.has_final_norm = c.do_layer_norm_before and not c.remove_final_layer_norm
        if self.has_final_norm:
            self.final_layer_norm = _norm(c, dtype, rngs)
        if not c.tie_word_embeddings:
            self.lm_head = bare(c.word_embed_proj_dim, c.vocab_size)

    def begin(
        self, tokens: Int32[Array, "batch length"], cache: KeyValueCache | None = None
    ) -> tuple[Float[Array, "batch length hidden"], tuple[()]]:
        length = tokens.shape[1]
        positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.positions(length)
        x = self.embed_tokens(tokens)
        if self.config.projects:
            x = self.project_in(x)
        # Right padding may stand past the last position; what it reads is masked, so any row of the table will do.
        last = self.config.max_position_embeddings - 1
        return x + self.embed_positions(jnp.minimum(positions, last) + POSITION_OFFSET), ()

    def final_norm(self, hidden: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        return self.final_layer_norm(hidden) if self.has_final_norm else hidden

    def head(self, hidden: Float[Array, "... hidden"]) -> Float32[Array, "... vocabulary"]:
        if self.config.projects:
            hidden = self.project_out(hidden)
        return unembed(hidden, getattr(self, self.head_name))

    def sites(self) -> list[Site]:
        """The places where linear layers read something (:mod:`fqjax.models.sites`).

        Values scale through attention to ``out_proj``, and ``fc1`` through ReLU to ``fc2``.  Where norms come after the
        layers, the residual connection reads what they give too.
        """
        c = self.config
        affine, heads = c.layer_norm_elementwise_affine, c.num_attention_heads
        values = 2 * c.hidden_size + np.arange(c.hidden_size)

        def normed(path: str) -> Norm | Stream | None:
            return Stream() if not c.do_layer_norm_before else Norm(path) if affine else None

        found = []
        for i in range(c.num_hidden_layers):
            layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
            through = Rows(f"{layer}.fc1", np.arange(c.ffn_dim)) if c.activation_function == "relu" else None
            found += [
                Site((f"{attention}.qkv_proj",), normed(f"{layer}.self_attn_layer_norm")),
                Site(
                    (f"{attention}.out_proj",),
                    Rows(f"{attention}.qkv_proj", values),
                    Heads(heads, heads, c.hidden_size // heads),
                ),
                Site((f"{layer}.fc1",), normed(f"{layer}.final_layer_norm")),
                Site((f"{layer}.fc2",), through),
            ]
        outside = [name for name in ("project_in", "project_out", "lm_head") if hasattr(self, name)]
        return found + [Site((name,)) for name in outside]

    def make_cache(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> KeyValueCache:
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        return KeyValueCache.create(
            c.num_hidden_layers,
            batch,
            capacity,
            c.num_attention_heads,
            head_dim,
            self.dtype if dtype is None else dtype,
        )


def _project(
    linear: LinearLayer, norm: nnx.LayerNorm | None, x: Array, pending: Array | None
) -> tuple[Float[Array, "batch length out"], Float[Array, "batch length hidden"]]:
    """A linear layer of the stream ``x + pending``, after the norm if there is one, and that stream."""
    if norm is not None:
        return after_norm(linear, norm, x, pending)
    x = x if pending is None else x + pending
    return linear(x), x


def _linear(config: OPTConfig, inputs: int, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=config.enable_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _norm(config: OPTConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=1e-5,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


def config_from_hf(hf: JsonMapping) -> OPTConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    check_choice(hf, "activation_function", ACTIVATIONS)
    read = sizes(
        hf, "vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim",
        "max_position_embeddings",
    )  # fmt: skip
    check_divides(read, "num_attention_heads", "hidden_size")
    return OPTConfig(
        **read,
        do_layer_norm_before=bool(hf["do_layer_norm_before"]),
        enable_bias=bool(hf["enable_bias"]),
        layer_norm_elementwise_affine=bool(hf["layer_norm_elementwise_affine"]),
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        activation_function=cast(str, hf["activation_function"]),
        remove_final_layer_norm=bool(hf.get("_remove_final_layer_norm")),
        bos_token_id=token_id(hf, "bos_token_id"),
        eos_token_id=eos_ids(hf),
    )
