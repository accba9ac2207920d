"""Quantized experts with their codes in one array, as the matmul over experts takes them; and back.

Checkpoints, reports and everything that works on layers have every expert's layers as layers of their own.  A model that
runs has them stacked: :func:`stacked` where a model was quantized or loaded, :func:`unstacked` where it is written.  Experts
that are not quantized alike (some in floating point, or with other scales) stay as they are, and run one by one.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Float32, UInt32

from fqjax.core.formats.base import QTensor
from fqjax.core.stored_inputs import Quantized, StoredInput
from fqjax.core.table import Stored
from fqjax.layers.experts import Expert, MixtureOfExperts, Routing, Sorted
from fqjax.layers.linear import QuantizedLinear, QuantizedVariable
from fqjax.layers.record import Figures, Record
from fqjax.layers.summary import shortened
from fqjax.layers.surgery import dotted, find_linears
from pallas_kernels import expert_matmul, row_alignment
from pallas_kernels.quantize.reference import activated

ModelT = TypeVar("ModelT", bound=nnx.Module)
StoredT = TypeVar("StoredT", bound=Stored)


class StackedLinear(nnx.Module):
    """The same layer of several experts.

    Attributes:
      weight: a :class:`~fqjax.core.formats.base.QTensor` whose arrays have an axis more, the first: the experts.
      input: a :class:`~fqjax.core.stored_inputs.StoredInput`: one for all experts, or with that axis too.
      shared: whether it is one for all.
      record: figures of each expert's layer, (experts, 4).
      recipes: of each expert's layer.
      dtype, param_dtype: as :class:`~fqjax.layers.linear.QuantizedLinear` has them.
    """

    def __init__(
        self,
        weight: QTensor,
        input: StoredInput,
        *,
        shared: bool,
        record: UInt32[Array, "experts 4"],
        recipes: tuple[str, ...],
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
    ):
        self.weight, self.input, self.record = QuantizedVariable(weight), QuantizedVariable(input), Record(record)
        self.shared, self.recipes = shared, recipes
        self.dtype, self.param_dtype = dtype, param_dtype

    def __nnx_repr__(self) -> Generator[Any, None, None]:
        return shortened(super().__nnx_repr__())

    def of_tokens(self, x: Float[Array, "tokens k"], pairs: Sorted) -> Float[Array, "rows n"]:
        """The outputs of the tokens' experts; tokens are quantized before they are dealt out, if that is the same for all."""
        if not self.shared:
            return self.of_pairs(x[pairs.token], pairs)
        codes, scale = self.input.get_value()(x)
        scale = scale[pairs.token] if scale.ndim else scale
        return self._multiply(Quantized(codes[pairs.token], scale), pairs, x.dtype)

    def of_pairs(self, x: Float[Array, "rows k"], pairs: Sorted) -> Float[Array, "rows n"]:
        """The outputs where every pair has an input of its own."""
        quantizer = self.input.get_value()
        return self._multiply(quantizer(x) if self.shared else quantizer.of_experts(x, pairs.expert), pairs, x.dtype)

    def _multiply(self, x: Quantized, pairs: Sorted, dtype: DTypeLike) -> Float[Array, "rows n"]:
        operand = self.weight.get_value().operand(weight_only=self.input.get_value().qmax is None)
        assert operand is not None  # Else they would not have been stacked.
        return expert_matmul(
            x.codes,
            operand,
            pairs.sizes,
            x.scale,
            out_dtype=self.dtype or jnp.result_type(dtype, self.param_dtype),
            alignment=row_alignment(),
        )

    def layers(self) -> list[QuantizedLinear]:
        """Every expert's layer by itself."""
        quantizer, weight = self.input.get_value(), self.weight.get_value()
        return [
            QuantizedLinear(
                _taken(weight, i),
                quantizer if self.shared else _taken(quantizer, i),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                figures=Figures.decoded(record),
                recipe=recipe,
            )
            for i, (record, recipe) in enumerate(zip(np.asarray(self.record.get_value()), self.recipes, strict=True))
        ]


class StackedExperts(nnx.Module):
    """Quantized experts that run together."""

    def __init__(self, gate_up_proj: StackedLinear, down_proj: StackedLinear):
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def __call__(self, rows: Float[Array, "tokens hidden"], routing: Routing) -> Float32[Array, "tokens hidden"]:
        """The experts' outputs for tokens, added up by weight."""
        pairs = routing.sorted(len(self.down_proj.recipes), row_alignment())
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


def stacked_experts(experts: Sequence[Expert]) -> StackedExperts | None:
    """Experts stacked; None if they are not quantized alike."""
    gate_up, down = (stack([getattr(expert, name) for expert in experts]) for name in ("gate_up_proj", "down_proj"))
    return None if gate_up is None or down is None else StackedExperts(gate_up, down)


def unstacked(model: ModelT) -> ModelT:
    """The model with every expert by itself; arrays may be shapes.  Itself if no experts are stacked."""
    copy = nnx.clone(model) if _mixtures(model, StackedExperts) else model
    for mixture in _mixtures(copy, StackedExperts):
        mixture.experts = mixture.experts.experts()
    return copy


def quantized_layers(model: nnx.Module) -> dict[str, QuantizedLinear]:
    """The model's quantized layers by dotted path, those of experts each by itself."""
    nodes = nnx.iter_graph(unstacked(model))
    return {dotted(path): node for path, node in nodes if isinstance(node, QuantizedLinear)}


def _stackable(model: nnx.Module) -> list[MixtureOfExperts]:
    """Those all of whose experts are quantized."""
    return [node for node in _mixtures(model, nnx.List) if not find_linears(node.experts)]


def _mixtures(model: nnx.Module, kind: type) -> list[MixtureOfExperts]:
    """Those whose experts are of some kind."""
    nodes = [node for _, node in nnx.iter_graph(model) if isinstance(node, MixtureOfExperts)]
    return [node for node in nodes if isinstance(node.experts, kind)]


def stack(layers: Sequence[nnx.Module]) -> StackedLinear | None:
    """Layers of one shape in one; None if some are not quantized, have a bias, differ in kind, or no kernel takes them."""
    plain = [layer for layer in layers if isinstance(layer, QuantizedLinear) and layer.bias is None and layer.is_plain]
    if len(plain) < len(layers) or len({_kind(layer) for layer in plain}) > 1:
        return None
    first, weights = plain[0], [layer.weight.get_value() for layer in plain]
    if weights[0].operand() is None:
        return None
    quantizers = [layer.input.get_value() for layer in plain]
    shared = all(_equal(quantizers[0], other) for other in quantizers[1:])
    return StackedLinear(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights),
        quantizers[0] if shared else jax.tree.map(lambda *leaves: jnp.stack(leaves), *quantizers),
        shared=shared,
        record=jnp.stack([layer.record.get_value() for layer in plain]),
        recipes=tuple(layer.recipe for layer in plain),
        dtype=first.dtype,
        param_dtype=first.param_dtype,
    )


def _kind(layer: QuantizedLinear) -> tuple[object, ...]:
    """Types, shapes and dtypes that layers have to have in common."""
    leaves, structure = jax.tree.flatten((layer.weight.get_value(), layer.input.get_value()))
    shapes = tuple((leaf.shape, leaf.dtype.name) for leaf in leaves)
    return structure, shapes, layer.dtype, layer.param_dtype


def _equal(a: StoredInput, b: StoredInput) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _taken(stacked: StoredT, i: int) -> StoredT:
    """One expert's part of what is stacked; arrays may be shapes."""

    def take(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.Array | jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf[i]

    return jax.tree.map(take, stacked)
