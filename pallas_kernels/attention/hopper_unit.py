"""The work of a unit of warps in attention over INT8 codes (:mod:`pallas_kernels.attention.hopper`).

First the warps turn and quantize the queries, the new key and the new value, a row each.  Then nothing is shared until the
end, when they put their outputs together through shared memory.  Lanes load of the cache, 16 bytes each, exactly what
the tensor cores take from them, so that keys and values never change their lane:

* Scores are ``q @ keys.T`` in integers.  The queries' codes of 15 bits lie as two int8 codes in the upper and lower eight
  rows of the left operand.  Which channel is which of a product's is free, so a lane takes neighbouring ones of a row.
* The output is found transposed, ``values.T @ weights.T``, since what a lane has of the scores is then what it needs of the
  weights.  Values become float16, exactly, two positions a word.
* A value's scale goes into the weight's exponent, as its logarithm: weights are at most 1, and float16 holds them well
  whatever the scales are.  The weights without it are added up beside them.

A tile's keys are fetched as soon as those before are used, and so are its values: while a warp computes, the next tile is on
its way.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention.hopper_cut import TILE_POSITIONS
from pallas_kernels.attention.hopper_memory import MOST_GROUP
from pallas_kernels.attention.hopper_output import Output
from pallas_kernels.attention.problem import UPPER_CODE_UNIT
from pallas_kernels.attention.reference import LOWEST_SCORE
from pallas_kernels.mosaic.lanes import Word

SMALLEST_SCALE = 1e-30
"""Below every value's scale: its logarithm is finite."""
LOG2_OF_E = math.log2(math.e)


class Query(NamedTuple):
    """The left operand's fragments, and the value of one in a product of codes."""

    fragments: list[tuple[Word, Word, Word, Word]]
    factor: Word


class Unit(Output):
    """A unit's work."""

    def run(self) -> None:
        """All of it."""
        p, o = self.p, self.o
        # Operands that are needed first are loaded first: tiles are so many bytes that later loads wait for them.
        (self.length,) = o.load(self.lengths, self.batch * 4)
        angles, rows, extra = self._angles(), self._new_rows(), self._extra_channels()
        self.oldest, begin = None, o.constant(0)
        if p.window is not None:  # Otherwise the first tile is known before the length is.
            self.oldest = o.maximum(self.length + (1 - p.window), o.constant(0))
            begin = self.oldest // TILE_POSITIONS
        last = o.constant(p.capacity - 1)
        first = begin + self.number
        shift = self._tile_shift(first, last)
        fetched = [*self._keys(first, last, shift), *self._values(first, last, shift)]
        self._keep_extra_channels(extra)
        queries = self._prepare(angles, rows)
        self._synchronize()
        self._see_new_token(queries)
        # Where there are no registers to keep the queries in, they are read again for each tile.
        query = self._query() if p.cut.warps * p.cut.units < 16 else None
        count = (self.length + (TILE_POSITIONS - 1)) // TILE_POSITIONS - begin - self.number
        turns = o.maximum(count + (self.warps - 1), o.constant(0)) // self.warps
        last = o.maximum(self.length - 1, o.constant(0))

        def turn(i: Word, carry: list[Word]) -> list[Word]:
            tile = begin + self.number + i * self.warps
            return self._tile(tile, last, query or self._query(), carry)

        nothing = [o.constant(LOWEST_SCORE), *[o.constant(0.0)] * (1 + p.dim // 4)]
        found = o.repeat(turns, turn, [*nothing, *fetched])[: len(nothing)]
        multipliers = self._multipliers()
        self._leave(found)
        self._synchronize()
        self._finish(*multipliers)

    # The new token: queries, a key and a value.

    def _prepare(self, angles: Sequence[Sequence[Word]], rows: Sequence[Sequence[Word]]) -> list[list[Word]]:
        """Turns and quantizes what is new; and writes the new token into the cache.

        Returns:
          The real values of the queries that the warp had, one round after the other.
        """
        p, o, tasks, queries = self.p, self.o, self.p.group + 2, []
        for first, words in zip(range(0, tasks, p.cut.warps), rows, strict=True):
            task = self.warp + first
            is_query, is_value = task < p.group, task > p.group
            halves = [o.unpair(p.dtype, word) for word in words]
            x = [*halves[0], *halves[1]]
            if p.rotates:
                x = self._turned(x, angles, is_value)
            limit = o.select(is_query, o.constant(127.0 * UPPER_CODE_UNIT), o.constant(127.0))
            largest = self._largest(x)
            inverse = o.reciprocal(largest) * limit
            size = largest * o.select(is_query, o.constant(1 / 127 / UPPER_CODE_UNIT), o.constant(1 / 127))
            whole = [o.rounded(value * inverse) for value in x]
            upper = [o.select(is_query, (value + UPPER_CODE_UNIT // 2) >> 7, value) for value in whole]
            lower = [value - (high << 7) for value, high in zip(whole, upper, strict=True)]
            with self._only(None if first + p.cut.warps <= tasks else task < tasks):
                self._keep(task, upper, lower)
                with o.when(self.lane < 1):
                    self._keep_shared("sizes", task, size)
            with o.when((task >= p.group) & (task < tasks)):
                self._append(is_value, task, upper, size)
            queries.append(x)
        return queries

    def _turned(self, x: Sequence[Word], angles: Sequence[Sequence[Word]], is_value: Word) -> list[Word]:
        """Channels of both halves, turned by their position if they are not a value's; as their dtype holds them."""
        o = self.o
        cos = [o.select(is_value, o.constant(1.0), a) for a in angles[0]]
        sin = [o.select(is_value, o.constant(0.0), a) for a in angles[1]]
        first = [x[i] * cos[i] - x[2 + i] * sin[i] for i in range(2)]
        second = [x[2 + i] * cos[i] + x[i] * sin[i] for i in range(2)]
        return self._rounded(first + second)

    def _largest(self, values: Sequence[Word]) -> Word:
        """The largest magnitude that a warp has."""
        o = self.o
        largest = functools.reduce(o.maximum, [o.maximum(x, 0 - x) for x in values])
        for distance in (1, 2, 4, 8, 16):
            largest = o.maximum(largest, o.across(largest, distance))
        return o.maximum(largest, o.constant(1e-8))

    def _keep(self, task: Word, upper: Sequence[Word], lower: Sequence[Word]) -> None:
        """Leaves codes in shared memory: all upper ones, a row after the other, then all lower ones."""
        p = self.p
        for i, codes in enumerate((upper, lower)):
            for half in range(2):
                at = ((task + i * (p.group + 2)) * p.dim + self._pair()) + half * p.dim // 2
                self._keep_shared("codes", at, self._two(codes[2 * half : 2 * half + 2]), nbytes=2)

    def _two(self, codes: Sequence[Word]) -> Word:
        return self.o.bytes_of(codes[0], codes[1], 0x0040)

    def _append(self, is_value: Word, task: Word, codes: Sequence[Word], size: Word) -> None:
        """Writes the new key or value into the cache, and its codes as real numbers into shared memory."""
        o, p = self.o, self.p
        for i, code in enumerate(codes):
            at = (task - p.group) * p.dim + self._pair() + (i % 2 + i // 2 * (p.dim // 2))
            self._keep_shared("new", at, o.real(code))
        position = o.minimum(self.length, o.constant(p.capacity - 1))
        place = self._cached(position, 1, self._shift(position))
        for kind, condition in enumerate((task < p.group + 1, is_value)):
            with o.when(condition & (self.split < 1)):
                for half in range(2):
                    to = place * p.dim + self._pair() + half * p.dim // 2
                    o.store(self.written[kind], to, self._two(codes[2 * half : 2 * half + 2]), nbytes=2)
                with o.when(self.lane < 1):
                    o.store(self.written[2 + kind], place * 4, size)

    def _see_new_token(self, queries: Sequence[Sequence[Word]]) -> None:
        """The queries' scores of the new token, as the cache holds it: statistics after those of the warps."""
        o, p = self.o, self.p
        key_size, value_size = (o.as_real(self._shared("sizes", o.constant(p.group + i))[0]) for i in range(2))
        channels = [self._pair() + (i % 2 + i // 2 * (p.dim // 2)) for i in range(4)]
        key = [o.as_real(self._shared("new", at)[0]) for at in channels]
        leads = self.split < 1
        for turn, x in enumerate(queries):
            score = functools.reduce(lambda a, b: a + b, [a * b for a, b in zip(x, key, strict=True)])
            for distance in (1, 2, 4, 8, 16)[: 3 + p.dim // 64]:
                score = score + o.across(score, distance)
            score = score * (key_size * (p.scale * LOG2_OF_E)) + o.log2(value_size)
            task = self.warp + turn * p.cut.warps
            with o.when((task < p.group) & (self.lane < 1)):
                at = task + p.cut.warps * 2 * MOST_GROUP
                best = o.select(leads, score, o.constant(LOWEST_SCORE))
                total = o.select(leads, o.reciprocal(value_size), o.constant(0.0))
                self._keep_shared("statistics", at, best)
                self._keep_shared("statistics", at + MOST_GROUP, total)

    def _query(self) -> Query:
        """The queries' codes from shared memory."""
        p, o, each = self.p, self.o, self.piece // 4
        task = o.minimum(self.row, o.constant(p.group - 1))
        high, low = [], []
        for i, words in enumerate((high, low)):
            for half in range(2):
                at = (task + i * (p.group + 2)) * (p.dim // 4) + self.column * each + half * p.dim // 8
                words += self._shared("codes", at, each)
        fragments = [(high[i], low[i], high[i + 1], low[i + 1]) for i in range(0, len(high), 2)]
        (size,) = self._shared("sizes", task)
        return Query(fragments, o.as_real(size) * (p.scale * LOG2_OF_E))

    # The tiles.

    def _tile(self, tile: Word, last: Word, query: Query, carry: Sequence[Word]) -> list[Word]:
        """A tile's share, and the next one on its way."""
        p, o = self.p, self.o
        count = p.dim // 4
        best, total, *rest = carry
        outputs, rest = rest[:count], rest[count:]
        *keys, key_scale, value_scale = rest[: p.dim // 8 + 2]
        values = rest[p.dim // 8 + 2 :]
        shift = self._tile_shift(tile + self.warps, last)
        products = self._products(query.fragments, keys)
        fetched = self._keys(tile + self.warps, last, shift)
        columns = [self.column * 2 + i for i in (0, 1, 8, 9)]
        key_scale, value_scale = o.as_real(key_scale), o.as_real(value_scale)
        exponent = o.log2(o.maximum(value_scale, o.constant(SMALLEST_SCALE)))
        scores, raised = [], []
        for product, at in zip(products, columns, strict=True):
            score = o.real(product) * (query.factor * o.shuffle(key_scale, at))
            position = tile * TILE_POSITIONS + at
            visible = last >= position
            if self.oldest is not None:
                visible = visible & (position >= self.oldest)
            scores.append(o.select(visible, score, o.constant(LOWEST_SCORE)))
            raised.append(scores[-1] + o.shuffle(exponent, at))
        higher = functools.reduce(o.maximum, raised)
        for distance in (1, 2):
            higher = o.maximum(higher, o.across(higher, distance))
        higher = o.maximum(higher, best)
        kept = o.exp2(best - higher)
        weights = [o.exp2(x - higher) for x in raised]
        total = total * kept + functools.reduce(lambda a, b: a + b, [o.exp2(x - higher) for x in scores])
        # A row of scores is a column of outputs.
        shares = [o.shuffle(kept, self.column * 8 + i) for i in (0, 4)]
        outputs = [x * shares[i % 2] for i, x in enumerate(outputs)]
        halves = [o.pair(jnp.float16, *weights[i : i + 2]) for i in (0, 2)]
        outputs = self._added(outputs, values, halves)
        return [higher, total, *outputs, *fetched, *self._values(tile + self.warps, last, shift)]

    def _products(self, fragments: Sequence[Sequence[Word]], keys: Sequence[Word]) -> list[Word]:
        """Of queries and keys: of the lane's row, for positions 0, 1, 8 and 9 of its column."""
        o, found, each = self.o, [], self.p.dim // 16
        for words in (keys[:each], keys[each:]):
            sums = [o.constant(0)] * 4
            for i, fragment in enumerate(fragments):
                sums = o.multiply_codes(sums, fragment, words[2 * i : 2 * i + 2])
            found += [(sums[i] << 7) + sums[i + 2] for i in range(2)]
        return found

    def _added(self, outputs: Sequence[Word], values: Sequence[Word], weights: Sequence[Word]) -> list[Word]:
        """Outputs with a tile's values, each times its weight."""
        o, found, each = self.o, [], self.piece // 4
        flipped = [word ^ -0x7F7F7F80 for word in values]  # Codes plus 128.
        positions = [flipped[i * each : (i + 1) * each] for i in range(4)]
        for word in range(each):
            pairs = []  # Of positions 0 and 1, and of 8 and 9: four channels' codes of both.
            for one, other in (positions[:2], positions[2:]):
                mixed = [o.bytes_of(one[word], other[word], selector) for selector in (0x5140, 0x7362)]
                # The bits 0x6400 + u are 1024 + u in float16, less 1152.
                biased = [
                    o.bytes_of(two, o.constant(0x64646464), selector) for two in mixed for selector in (0x4140, 0x4342)
                ]
                pairs.append([o.minus_halves(x, 0x64806480) for x in biased])
            for channel in (0, 2):
                fragment = [pair[channel + i] for pair in pairs for i in range(2)]
                at = 4 * (2 * word + channel // 2)
                found += o.multiply_halves(outputs[at : at + 4], fragment, weights)
        return found
