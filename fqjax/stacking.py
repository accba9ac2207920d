"""Quantized experts with their codes in one array, as the matmul over experts takes them; and back.

Checkpoints, reports and everything that works on layers have every expert's layers as layers of their own.  A model that
runs has them stacked: :func:`stacked` where a model was quantized or loaded, :func:`unstacked` where it is written.  Experts
that are not quantized alike (some in floating point, or with other scales) stay as they are, and run one by one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from fqjax.core.flatten import PADDING
from fqjax.experts import Expert, MixtureOfExperts, Routing, Sorted
from fqjax.linear import LayerSummary, Quantized, QuantizedLinear
from fqjax.qtensor import InputQuantizer, QTensor
from fqjax.surgery import find_linears
from pallas_kernels import (
    Weight,
    decoder_for,
    expert_matmul,
    quantize_for_experts,
    quantize_per_token_for_experts,
    row_alignment,
)
from pallas_kernels.quantize.reference import activated

ModelT = TypeVar("ModelT", bound=nnx.Module)


class StackedLinear(nnx.Module):
    """The same layer of several experts.

    Attributes:
      weight: :class:`~fqjax.qtensor.QTensor` whose arrays have an axis more, the first: the experts.
      input: :class:`~fqjax.qtensor.InputQuantizer`: one for all experts, or with that axis too.
      shared: whether it is one for all.
      used: flattened channels of each expert's input.
      summaries: of each expert's layer.
      dtype, param_dtype: as :class:`~fqjax.linear.QuantizedLinear` has them.
    """

    def __init__(
        self,
        weight: QTensor,
        input: InputQuantizer,
        *,
        shared: bool,
        used: tuple[int, ...],
        summaries: tuple[LayerSummary, ...],
        dtype: Any,
        param_dtype: Any,
    ):
        self.weight, self.input = Quantized(weight), Quantized(input)
        self.shared, self.used, self.summaries = shared, used, summaries
        self.dtype, self.param_dtype = dtype, param_dtype

    def of_tokens(self, x: Float[Array, "tokens k"], pairs: Sorted) -> Float[Array, "rows n"]:
        """The outputs of the tokens' experts; tokens are quantized before they are dealt out, if that is the same for all."""
        if not self.shared:
            return self.of_pairs(x[pairs.token], pairs)
        codes, scale = self.input.get_value()(x)
        return self._multiply(codes[pairs.token], scale[pairs.token] if scale.ndim else scale, pairs, x.dtype)

    def of_pairs(self, x: Float[Array, "rows k"], pairs: Sorted) -> Float[Array, "rows n"]:
        """The outputs where every pair has an input of its own."""
        codes, scale = self.input.get_value()(x) if self.shared else self._quantized(x, pairs)
        return self._multiply(codes, scale, pairs, x.dtype)

    def _quantized(self, x: Float[Array, "rows k"], pairs: Sorted) -> tuple[Array, Float32[Array, "..."]]:
        q = self.input.get_value()
        width = q.multiplier.shape[1] + q.source.shape[1]
        if q.bits == 16:
            smooth = (x.astype(jnp.float32) * q.multiplier[pairs.expert]).astype(x.dtype)
            return jnp.pad(smooth, ((0, 0), (0, width - x.shape[1]))), jnp.float32(1)
        if q.scale is None:
            return quantize_per_token_for_experts(x, pairs.expert, q.multiplier, qmax=q.qmax, width=width)
        codes = quantize_for_experts(x, pairs.expert, q.multiplier, q.source, q.part, qmax=q.qmax)
        return codes, q.scale[pairs.expert]

    def _multiply(self, codes: Array, scale: Float32[Array, "..."], pairs: Sorted, dtype: Any) -> Array:
        weight = self.weight.get_value()
        decoder = decoder_for(
            weight.format.bits,
            group_dtype=None if weight.group_scale is None else weight.group_scale.dtype,
            folded=weight.format.folded,
            weight_only=jnp.issubdtype(codes.dtype, jnp.floating),
        )
        return expert_matmul(
            codes,
            Weight(decoder, weight.codes, weight.scale, weight.group_scale),
            pairs.sizes,
            scale,
            out_dtype=self.dtype or jnp.result_type(dtype, self.param_dtype),
            alignment=row_alignment(),
        )

    def layers(self) -> list[QuantizedLinear]:
        """Every expert's layer by itself."""
        quantizer = self.input.get_value()
        made = []
        for i, (used, summary) in enumerate(zip(self.used, self.summaries, strict=True)):
            own = quantizer if self.shared else jax.tree.map(lambda leaf, i=i: _taken(leaf, i), quantizer)
            weight = jax.tree.map(lambda leaf, i=i: _taken(leaf, i), self.weight.get_value())
            kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "summary": summary}
            made.append(QuantizedLinear(weight, dataclasses.replace(own, used=used), None, **kinds))
        return made


class StackedExperts(nnx.Module):
    """Quantized experts that run together."""

    def __init__(self, gate_up_proj: StackedLinear, down_proj: StackedLinear):
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def __call__(self, rows: Float[Array, "tokens hidden"], routing: Routing) -> Float32[Array, "tokens hidden"]:
        """What the experts make of tokens, added up by weight."""
        pairs = routing.sorted(len(self.down_proj.summaries), row_alignment())
        hidden = activated(self.gate_up_proj.of_tokens(rows, pairs), "silu", gated=True)
        return routing.mixed(self.down_proj.of_pairs(hidden, pairs), pairs)

    def experts(self) -> nnx.List:
        """Every expert by itself."""
        layers = zip(self.gate_up_proj.layers(), self.down_proj.layers(), strict=True)
        return nnx.List([Expert(gate_up, down) for gate_up, down in layers])  # pyright: ignore[reportArgumentType]


def stacked(model: ModelT, *, in_place: bool = False) -> ModelT:
    """The model with its quantized experts stacked where they are quantized alike; itself if there are none.

    ``in_place`` changes the model rather than a copy, and gives its arrays up as it goes.
    """
    copy = model if in_place or not _stackable(model) else nnx.clone(model)
    for mixture in _stackable(copy):
        mixture.experts = stacked_experts(mixture.experts) or mixture.experts
    return copy


def stacked_experts(experts: Sequence[Any]) -> StackedExperts | None:
    """Experts stacked; None if they are not quantized alike."""
    gate_up, down = (stack([getattr(expert, name) for expert in experts]) for name in ("gate_up_proj", "down_proj"))
    return None if gate_up is None or down is None else StackedExperts(gate_up, down)


def unstacked(model: ModelT) -> ModelT:
    """The model with every expert by itself; arrays may be shapes.  Itself if no experts are stacked."""
    copy = nnx.clone(model) if _mixtures(model, StackedExperts) else model
    for mixture in _mixtures(copy, StackedExperts):
        mixture.experts = mixture.experts.experts()
    return copy


def _stackable(model: nnx.Module) -> list[MixtureOfExperts]:
    """Those all of whose experts are quantized."""
    return [node for node in _mixtures(model, nnx.List) if not find_linears(node.experts)]


def _mixtures(model: nnx.Module, kind: type) -> list[MixtureOfExperts]:
    """Those whose experts are of some kind."""
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, MixtureOfExperts)]
    return [node for node in nodes if isinstance(node.experts, kind)]


def stack(layers: Sequence[Any]) -> StackedLinear | None:
    """Layers of one shape in one; None if some are not quantized, have a bias, or differ in kind."""
    quantized = all(isinstance(layer, QuantizedLinear) and layer.bias is None for layer in layers)
    if not quantized or len({_kind(layer) for layer in layers}) > 1:
        return None
    weights, quantizers = zip(*(_parts(layer) for layer in layers), strict=True)
    shared = all(_equal(quantizers[0], other) for other in quantizers[1:])
    first = layers[0]
    return StackedLinear(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights),
        quantizers[0] if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *quantizers),
        shared=shared,
        used=tuple(layer.input.get_value().used for layer in layers),
        summaries=tuple(layer.summary for layer in layers),
        dtype=first.dtype,
        param_dtype=first.param_dtype,
    )


def _kind(layer: QuantizedLinear) -> tuple[Any, ...]:
    """What layers have to have in common."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    numbers = (weight.shape, quantizer.multiplier.shape, weight.scale.ndim, quantizer.bits, quantizer.scale is None)
    return weight.format, *numbers, layer.dtype, layer.param_dtype


def _parts(layer: QuantizedLinear) -> tuple[QTensor, InputQuantizer]:
    """Weight and recipe, which leaves the number of flattened channels out."""
    return layer.weight.get_value(), dataclasses.replace(layer.input.get_value(), used=0)


def widened(layer: QuantizedLinear, width: int) -> QuantizedLinear:
    """The layer with more channels of padding, up to a width."""
    weight, quantizer = layer.weight.get_value(), layer.input.get_value()
    missing = width - weight.shape[1]
    if not missing:
        return layer
    codes = jnp.pad(weight.codes, ((0, 0), (0, missing // (2 if weight.format.packed else 1))))
    groups = weight.group_scale
    if groups is not None:
        groups = jnp.pad(groups, ((0, missing // weight.format.group_size), (0, 0)), constant_values=1)
    source = jnp.pad(quantizer.source, (0, missing))
    part = jnp.pad(quantizer.part, (0, missing), constant_values=PADDING)
    return QuantizedLinear(
        dataclasses.replace(weight, codes=codes, group_scale=groups),
        dataclasses.replace(quantizer, source=source, part=part),
        None if layer.bias is None else layer.bias[...],
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        summary=layer.summary,
    )


def _equal(a: InputQuantizer, b: InputQuantizer) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _taken(leaf: Any, i: int) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return leaf[i]
