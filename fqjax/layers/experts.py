"""A mixture of experts: a router sends every token to some of several MLPs, and their outputs are added up by its weights.

    p = softmax(gate(x)),  chosen = the k largest of p,  y = sum over chosen e of p_e * expert_e(x)

with p divided by the sum of the chosen ones where the model says so (arXiv 2401.04088, section 2.1).  Routing is float32.

There are three ways to run the experts, and all compute the same:

- quantized alike: their weights are stacked (:class:`StackedExperts`), the tokens' codes sorted by expert, and all of it is
  two matmuls (:func:`pallas_kernels.expert_matmul`).  What the experts read is quantized once for each token;
- any others, in float or not: the tokens sorted by expert, each expert on its own;
- watched by calibration: every expert on all tokens, of which those count that the router sends to it.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from fqjax.layers.taps import is_watched, watched
from pallas_kernels.quantize.reference import activated

TILE_ROWS_LIMIT = 1024
"""Rows that an expert in floating point takes at once, at most."""
TILE_ROWS_MULTIPLE = 16
"""Number that the rows of such a tile are a multiple of."""


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
      chosen: the experts of each token, (tokens, k).
      weights: what the output of each is multiplied with.
    """

    chosen: Int32[Array, "tokens k"]
    weights: Float32[Array, "tokens k"]

    def shares(self, experts: int) -> Float32[Array, "tokens experts"]:
        """The weight of every expert for every token; 0 where it was not chosen."""
        tokens = jnp.arange(len(self.chosen))[:, None]
        return jnp.zeros((len(self.chosen), experts), jnp.float32).at[tokens, self.chosen].set(self.weights)

    def sorted(self, experts: int, alignment: int = 1) -> "Sorted":
        """The pairs of a token and one of its experts, sorted by expert.

        Every expert gets rows in multiples of ``alignment``; where it has fewer pairs, the first token fills them up.
        """
        expert = self.chosen.reshape(-1)
        pairs, k = len(expert), self.chosen.shape[1]
        order = jnp.argsort(expert, stable=True)
        sizes = jnp.bincount(expert, length=experts)
        if alignment == 1:
            place = jnp.zeros_like(order).at[order].set(jnp.arange(pairs))
            return Sorted(order // k, expert[order], sizes, place)
        room = -(-sizes // alignment) * alignment
        first, begin = jnp.cumsum(sizes) - sizes, jnp.cumsum(room) - room
        row = begin[expert[order]] + jnp.arange(pairs) - first[expert[order]]
        rows = -(-(pairs + (alignment - 1) * min(experts, pairs)) // alignment) * alignment
        token, owner = (jnp.zeros(rows, jnp.int32).at[row].set(what) for what in (order // k, expert[order]))
        return Sorted(token, owner, room, jnp.zeros_like(order).at[order].set(row))

    def mixed(self, rows: Float[Array, "rows n"], pairs: "Sorted") -> Float32[Array, "tokens n"]:
        """The outputs of the sorted pairs, added up by weight."""
        each = rows[pairs.place].reshape(*self.chosen.shape, rows.shape[1]).astype(jnp.float32)
        return jnp.sum(each * self.weights[..., None], axis=1)


class Sorted(NamedTuple):
    """Pairs of a token and an expert, sorted by expert, a row each; there may be rows that nobody needs.

    Attributes:
      token, expert: of each row.
      sizes: rows of each expert.
      place: the row of pair (token, i-th expert), in the order of the tokens.
    """

    token: Int32[Array, " rows"]
    expert: Int32[Array, " rows"]
    sizes: Int32[Array, " experts"]
    place: Int32[Array, " pairs"]


def route(logits: Float32[Array, "tokens experts"], k: int, *, normalized: bool) -> Routing:
    """The k experts with the largest probabilities; ``normalized`` divides their weights by the sum."""
    weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), k)
    return Routing(chosen, weights / jnp.sum(weights, axis=-1, keepdims=True) if normalized else weights)


class Expert(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, gate_up_proj: nnx.Linear, down_proj: nnx.Linear):
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def __call__(
        self, x: Float[Array, "rows hidden"], shares: Float32[Array, " rows"] | None = None
    ) -> Float[Array, "rows hidden"]:
        """Maps rows; ``shares`` says how much each counts, to whom it may concern (:mod:`fqjax.layers.taps`)."""
        return watched(self.down_proj, activated(watched(self.gate_up_proj, x, shares), "silu", gated=True), shares)


class MixtureOfExperts(nnx.Module):
    """A router and its experts.

    Attributes:
      gate: the router, hidden size -> number of experts; never quantized.
      experts: an ``nnx.List`` of :class:`Expert`, or what :func:`fqjax.layers.stacked.stacked` makes of it.
    """

    shared_inputs: ClassVar[tuple[str, ...]] = ("gate_up_proj",)
    """The layers of an expert that read the same as those of the other experts."""

    def __init__(self, gate: nnx.Linear, experts: Iterable[Expert], k: int, *, normalized: bool):
        self.gate, self.k, self.normalized = gate, k, normalized
        self.experts: Any = nnx.List(experts)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        rows = x.reshape(-1, x.shape[-1])
        logits = jnp.dot(rows, self.gate.kernel[...], preferred_element_type=jnp.float32)
        routing = route(logits, self.k, normalized=self.normalized)
        if not isinstance(self.experts, nnx.List):
            mixed = self.experts(rows, routing)
        elif is_watched(self.experts):
            mixed = run_all(self.experts, rows, routing)
        else:
            mixed = run_chosen(self.experts, rows, routing)
        return mixed.astype(x.dtype).reshape(x.shape)


def run_all(
    experts: Iterable[Callable[..., Array]], rows: Float[Array, "tokens hidden"], routing: Routing
) -> Float32[Array, "tokens hidden"]:
    """Every expert on all tokens."""
    experts = list(experts)
    shares = routing.shares(len(experts))
    return sum(
        (expert(rows, s).astype(jnp.float32) * s[:, None] for expert, s in zip(experts, shares.T, strict=True)),
        jnp.zeros(rows.shape, jnp.float32),
    )


def run_chosen(
    experts: Iterable[Callable[..., Array]], rows: Float[Array, "tokens hidden"], routing: Routing
) -> Float32[Array, "tokens hidden"]:
    """Every expert on the tokens that are sent to it, tile by tile of them; an expert without any is not run."""
    experts = list(experts)
    pairs = routing.sorted(len(experts))
    size = min(TILE_ROWS_LIMIT, max(1, -(-len(pairs.token) // TILE_ROWS_MULTIPLE)) * TILE_ROWS_MULTIPLE)
    x = jnp.pad(rows[pairs.token], ((0, size), (0, 0)))
    one = jax.eval_shape(experts[0], jax.ShapeDtypeStruct((size, x.shape[1]), x.dtype))
    found = jnp.zeros((len(x), one.shape[1]), one.dtype)
    begins, tiles = jnp.cumsum(pairs.sizes) - pairs.sizes, -(-pairs.sizes // size)
    for i, expert in enumerate(experts):

        def tile(t: Array, found: Array, begin: Array = begins[i], expert: Callable[..., Array] = expert) -> Array:
            """One tile; rows that the last one writes after its expert's, the next expert writes over."""
            at = begin + t * size
            return lax.dynamic_update_slice_in_dim(found, expert(lax.dynamic_slice_in_dim(x, at, size)), at, 0)

        found = lax.fori_loop(0, tiles[i], tile, found)
    return routing.mixed(found, pairs)
