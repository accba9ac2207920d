"""The kernel of the fused pass before a matmul (Pallas Triton); see :mod:`pallas_kernels.quantize.dispatch`."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.mosaic.math import ACTIVATIONS, code_beyond, held_before, rounded, runs
from pallas_kernels.mosaic.types import Ref, Scalar
from pallas_kernels.quantize.kind import Quantization


class _Part(NamedTuple):
    """Some of a row's channels: their places in x, those that they gate, those of their codes; and their factor and shift."""

    at: Array | pl.Slice
    beside: Array | pl.Slice
    to: Array | pl.Slice
    multiplier: Array
    shift: Array | None


class _Read(NamedTuple):
    """Values of such channels, float32: to be normalised, activated or quantized; and the values that they gate, if any."""

    x: Array
    beside: Array | None


def kernel(kind: Quantization, programs: int, pieces: Sequence[tuple[int, int]], interpret: bool, *refs: Ref) -> None:
    """One program: every so many-th row, or a piece of one.  The recipe, the same for all rows, is read once."""
    results = 1 + kind.per_token + kind.residual
    operands = kind.split(refs[:-results])
    x_ref, sums_ref, largest_ref, residual_ref, weight_ref, bias_ref, (multiplier_ref, *flattening) = operands
    codes_ref, *others = refs[-results:]
    (rows, width), k = codes_ref.shape, multiplier_ref.shape[0]

    def part(at: Array | pl.Slice, beside: Array | pl.Slice, to: Array | pl.Slice) -> _Part:
        multiplier = given = multiplier_ref[at]
        if weight_ref is not None:
            multiplier = given * weight_ref[at].astype(jnp.float32)
        return _Part(at, beside, to, multiplier, None if bias_ref is None else given * bias_ref[at].astype(jnp.float32))

    def read(row: Scalar, part: _Part) -> _Read:
        if kind.parts is not None and sums_ref is not None:
            return _Read(kind.parts.read(x_ref, sums_ref, row, part.at), None)
        x = x_ref[row, part.at].astype(jnp.float32)
        if residual_ref is not None:
            x = x + residual_ref[row, part.at].astype(jnp.float32)
        return _Read(x, x_ref[row, part.beside].astype(jnp.float32) if kind.gated else None)

    def scaled(part: _Part, held: _Read, mean: Array | float, factor: Array | float) -> Array:
        """Values to be rounded, or to be divided by their row's scale and rounded."""
        x, beside = held
        if kind.epsilon is not None:
            y = (x - mean if kind.center else x) * factor * part.multiplier
            return y if part.shift is None else y + part.shift
        if kind.activation is not None:
            x = ACTIVATIONS[kind.activation](x)
        return x * part.multiplier if beside is None else x * part.multiplier * beside

    def channels(start: Scalar, n: int) -> _Part:
        return part(pl.ds(start, n), pl.ds(k + start, n), pl.ds(start, n))

    def added(start: Scalar, n: int) -> tuple[_Part, Array]:
        """Extra channels, and the magnitude that those before them hold."""
        source, full = (ref[pl.ds(start, n)] for ref in flattening)
        return part(source, k + source, pl.ds(k + start, n)), held_before(full, kind.qmax)

    def code(y: Array) -> Array:
        return rounded(y, kind.qmax, interpret).astype(jnp.int8)

    def scale_of(largest: Sequence[Array]) -> Array:
        return jnp.maximum(functools.reduce(jnp.maximum, map(jnp.max, largest)), 1e-8) / kind.qmax

    def given(row: Scalar) -> Array | None:
        """A row's scale, where its largest magnitudes are known."""
        if largest_ref is None:
            return None
        return scale_of([largest_ref[row, pl.ds(*at)] for at in runs(largest_ref.shape[1])])

    def known(
        parts: Sequence[_Part], entered: Sequence[_Read]
    ) -> tuple[Array | float, Array | float, list[Array], Array | None]:
        """A row's mean, its factor, its channels after both, and its scale, None where it has none."""
        mean = factor = 1.0
        scale = None
        if kind.epsilon is not None:
            centered = [held.x for held in entered]
            if kind.center:
                mean = sum(jnp.sum(x) for x in centered) * (1 / k)
                centered = [x - mean for x in centered]
            factor = lax.rsqrt(sum(jnp.sum(x * x) for x in centered) * (1 / k) + kind.epsilon)
        values = [scaled(part, held, mean, factor) for part, held in zip(parts, entered, strict=True)]
        if kind.per_token and not kind.largest:
            scale = scale_of([jnp.abs(y) for y in values])
        return mean, factor, values, scale

    def piece(row: Scalar, place: Scalar) -> None:
        """Some of a row's channels; statistics of all of them are computed once more for each piece."""
        (n, count), (extra_n, extra_count) = pieces

        def first() -> tuple[_Part, _Read]:
            part = channels(jnp.minimum(place, count - 1) * n, n)
            return part, read(row, part)

        def further() -> tuple[_Part, Array, _Read]:
            part, before = added(jnp.maximum(place - count, 0) * extra_n, extra_n)
            return part, before, read(row, part)

        flattened = extra_count and not kind.per_token  # Otherwise extra channels are padding.
        early = late = None
        mean = factor = 1.0
        scale = given(row)
        if kind.whole:
            parts = [channels(*at) for at in runs(k)]
            entered = [read(row, part) for part in parts]
            # What is read twice is read before the row is added up: the sum need not be waited for.
            early, late = first(), further() if flattened else None
            mean, factor, _, scale = known(parts, entered)

        @pl.when(place < count)
        def own() -> None:
            part, held = early or first()
            if kind.residual:
                others[-1][row, part.at] = held.x.astype(x_ref.dtype)
            y = scaled(part, held, mean, factor)
            codes_ref[row, part.to] = code(y if scale is None else y / scale)

        def beyond() -> None:
            if not flattened:
                codes_ref[row, pl.ds(k + (place - count) * extra_n, extra_n)] = jnp.zeros(extra_n, jnp.int8)
                return
            part, before, held = late or further()
            codes_ref[row, part.to] = code_beyond(scaled(part, held, mean, factor), before, kind.qmax, interpret)

        def the_scale() -> None:
            assert scale is not None
            others[0][row] = scale

        if extra_count:
            pl.when(place >= count)(beyond)
        if kind.per_token:
            pl.when(place == 0)(the_scale)

    def one(row: Scalar) -> None:
        entered = [read(row, part) for part in parts]
        # What is read twice is read before the row is added up: the sum need not be waited for.
        again = [read(row, part) for part, _ in extras]
        mean, factor, values, scale = known(parts, entered)
        scale = given(row) if kind.largest else scale
        if kind.residual:
            for part, held in zip(parts, entered, strict=True):
                others[-1][row, part.at] = held.x.astype(x_ref.dtype)
        if scale is not None:
            others[0][row] = scale
            values = [y / scale for y in values]
        for part, y in zip(parts, values, strict=True):
            codes_ref[row, part.to] = code(y)
        for start, n in padding:
            codes_ref[row, pl.ds(k + start, n)] = jnp.zeros(n, jnp.int8)
        for (part, before), held in zip(extras, again, strict=True):
            codes_ref[row, part.to] = code_beyond(scaled(part, held, mean, factor), before, kind.qmax, interpret)

    number = pl.program_id(0)
    if pieces:
        each = sum(count for _, count in pieces)
        return piece(number // each, number % each)
    parts = [channels(*at) for at in runs(k)]
    extras = [] if kind.per_token else [added(*at) for at in runs(width - k)]
    padding = runs(width - k) if kind.per_token else []
    if rows == programs:
        one(number)
    else:
        turns = (rows - number + programs - 1) // programs
        lax.fori_loop(0, turns, lambda i, _: one(number + i * programs), None)
