"""Models of real size with random weights, made on the device in the format that they run in.

What a model's time depends on is its shapes, formats and kernels, not what it says.  So nothing is quantized here: codes are
drawn, from a normal distribution as those of models are (with few different values a GPU needs less power, and its clock
stays higher), and scales are such that activations keep their size from layer to layer.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from fqjax.bench.environment import Record
from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import abstract_model
from fqjax.core.channels import PADDING
from fqjax.core.codes import qmax
from fqjax.core.formats.base import Format, QTensor
from fqjax.core.formats.grouped import Grouped
from fqjax.core.formats.uniform import Uniform
from fqjax.core.stored_inputs import FloatingInput, PerTokenInput, StaticInput, StoredInput
from fqjax.drivers.method import Method
from fqjax.drivers.ties import units_of
from fqjax.layers.experts import Expert, MixtureOfExperts
from fqjax.layers.head import with_int8_head
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import Figures
from fqjax.layers.stacked import stacked_experts
from fqjax.layers.surgery import replace_modules, select_linears
from fqjax.models import FAMILIES
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme

Config: TypeAlias = Any
"""Configuration of an architecture; its fields are those of the family in :data:`fqjax.models.FAMILIES`."""

LLAMA_3: Record = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
    "bos_token_id": 128000,
}
CONFIGS: dict[str, Record] = {
    "llama-3-8b": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-3-70b": LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "opt-30b": {
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "vocab_size": 50272,
        "hidden_size": 7168,
        "ffn_dim": 28672,
        "num_hidden_layers": 48,
        "num_attention_heads": 56,
        "word_embed_proj_dim": 7168,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    },
    "mixtral-8x7b": LLAMA_3
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "sliding_window": None,
        "bos_token_id": 1,
    },
    "tiny": LLAMA_3
    | {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
    },
}
"""Sizes of well-known models, by the name that ``fqjax bench model --model`` takes, and of one small enough for a CPU."""


def architecture(name: str) -> tuple[str, Config]:
    """Name and configuration of the architecture of that name in :data:`CONFIGS`, or in that ``config.json``.

    Raises:
      InputError: if there is neither, or the file is no configuration of a family that fqjax has.
    """
    if name in CONFIGS:
        return described(CONFIGS[name])
    path = Path(name)
    if path.name != "config.json" or not path.is_file():
        raise InputError(f"--model {name}: expected a config.json, or one of {', '.join(CONFIGS)}")
    return read_architecture(path.parent)


def described(hf: Record) -> tuple[str, Config]:
    """Name and configuration of the architecture that a complete Hugging Face configuration describes."""
    (name,) = hf["architectures"]
    return name, FAMILIES[name].config_from_hf(dict(hf))


def random_model(name: str, config: Config, scheme: Scheme, *, extra: float = 0.0, seed: int = 0) -> CausalLM:
    """A model in bfloat16 whose linear layers have the formats that a scheme gives them.

    Args:
      name: of the architecture, one of :data:`fqjax.models.FAMILIES`.
      config: its configuration.
      scheme: layers get 4 bits in turns, as nearly in its method's ``int4_share`` as may be.
      extra: with a method that flattens, extra channels over channels, K'/K - 1.
      seed: of the weights.
    """
    skeleton = abstract_model(name, config, jnp.bfloat16)
    keys = map(functools.partial(jax.random.fold_in, jax.random.key(seed)), range(1 << 30))
    made, done, total = {}, 0, 0
    method = scheme.method
    linears = select_linears(skeleton).linears if method is not None else {}
    for names in units_of(linears).values():
        linear = linears[names[0]]
        all_macs = unit_macs(linear, len(names), config)
        assert method is not None
        bits = 4 if done < method.allocation.int4_share * (total + all_macs) else 8
        done, total = done + all_macs * (bits == 4), total + all_macs
        for layer in names:
            made[layer] = functools.partial(_layer, linear=linear, method=method, recipe=scheme.recipe(), bits=bits)
            made[layer].keywords["macs"] = all_macs // len(names)
            made[layer].keywords["extra"] = extra if method.max_expansion > 1 else 0.0

    def quantized(path: str, node: Any) -> nnx.Module:
        if path in made and ".experts." not in path:
            return made[path](next(keys))
        if linears and isinstance(node, MixtureOfExperts):  # Stacked at once: there is no room for the model twice.
            each = [
                (made[f"{path}.experts.{i}.{p}"] for p in ("gate_up_proj", "down_proj"))
                for i in range(len(node.experts))
            ]
            node.experts = stacked_experts([Expert(up(next(keys)), down(next(keys))) for up, down in each])
        return node

    graphdef, state = nnx.split(replace_modules(skeleton, quantized))

    def fill(path: tuple[object, ...], leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
        names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
        return leaf if isinstance(leaf, jax.Array) else _parameter(next(keys), names, leaf)

    model = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, state))
    return with_int8_head(model) if scheme.head else model


def unit_macs(linear: nnx.Linear, layers: int, config: Config) -> int:
    """Multiply-accumulates of one token in a unit (:mod:`fqjax.drivers.ties`); a token uses some of its experts."""
    return linear.in_features * linear.out_features * (1 if layers == 1 else config.num_experts_per_tok)


def _layer(
    key: jax.Array, linear: nnx.Linear, method: Method, recipe: str, bits: int, extra: float, macs: int
) -> QuantizedLinear:
    k, n = linear.in_features, linear.out_features
    form, quantizer = method.formats(bits)
    used = round(extra * k)
    x_bits = 4 if bits == 4 and method.coarse_activations else 8
    figures = Figures(macs=macs, flattened=used)
    weight = _weight(key, form, n, k, form.padded(k + used))
    source = _input(quantizer, k, used, weight.shape[1], x_bits)
    bias = jnp.zeros(n, jnp.bfloat16) if linear.bias is not None else None
    return QuantizedLinear(
        weight, source, bias, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, figures=figures, recipe=recipe
    )


def _weight(key: jax.Array, form: Format, n: int, k: int, width: int) -> QTensor:
    """Random codes (n, width) in a format, with scales such that outputs are as large as inputs.

    Raises:
      InputError: for a format of which no random weights can be made.
    """
    if isinstance(form, Uniform):
        codes, _, unit = _codes(key, n, width, form.bits, 0, "float")
        return form.store(
            codes, jnp.full((n,) if form.granularity == "channel" else (), unit / np.sqrt(k), jnp.float32)
        )
    if isinstance(form, Grouped):
        codes, scales, unit = _codes(key, n, width, form.bits, form.group_size, form.scales)
        per_channel = dataclasses.replace(form, granularity="channel")
        return per_channel.store(codes, jnp.full((n,), unit / np.sqrt(k), jnp.float32), scales)
    raise InputError(f"format {form.kind!r}: no random weights can be made of it; expected uniform or grouped")


def _input(quantizer: type[StoredInput], k: int, used: int, width: int, bits: int) -> StoredInput:
    """A quantizer of inputs with a deviation of 1, of which static scales reach to 4 deviations."""
    static = quantizer is StaticInput
    scale, index = 4 / qmax(bits) if static else 1.0, np.arange(width - k)
    multiplier = jnp.full(k, 1 / scale, jnp.float32)
    source = jnp.asarray(index * k // max(used, 1) % k, jnp.int32)
    part = jnp.asarray(np.where(index < used, 1, PADDING), jnp.int32)
    if quantizer is FloatingInput:
        return FloatingInput(multiplier=multiplier, source=source, part=part)
    if quantizer is PerTokenInput:
        return PerTokenInput(multiplier=multiplier, source=source, part=part, bits=bits)
    return StaticInput(multiplier=multiplier, source=source, part=part, scale=jnp.float32(scale), bits=bits)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _codes(
    key: jax.Array, n: int, width: int, bits: int, group: int, scales: str
) -> tuple[jax.Array, jax.Array | None, float]:
    """Codes (n, width), scales of their groups if there are any, and about what makes the products' deviation 1."""
    spread = {4: 3.0, 8: 32.0}[bits]
    codes = jnp.clip(jnp.round(jax.random.normal(key, (n, width), jnp.bfloat16) * spread), -qmax(bits), qmax(bits))
    if not group:
        return codes.astype(jnp.int8), None, 1 / spread
    low, high = {"float": (512, 1024), "integer": (512, 1024), "folded": (8, 16)}[scales]
    factors = jax.random.randint(key, (width // group, n), low, high)
    kind = jnp.float32 if scales == "float" else jnp.int16
    return codes.astype(jnp.int8), factors.astype(kind), 4 / (3 * spread * low)


def _parameter(key: jax.Array, names: list[str], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """An embedding, a weight left in floating point, a norm's weight or a bias."""
    if "bias" in names:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if len(leaf.shape) < 2:
        return jnp.ones(leaf.shape, leaf.dtype)
    return _normal(key, leaf.shape, leaf.dtype, 1.0 if "embedding" in names else leaf.shape[0] ** -0.5)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, size: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) * size).astype(dtype)
