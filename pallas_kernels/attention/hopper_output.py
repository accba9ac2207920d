"""The end of a unit of warps in attention over INT8 codes: parts are put together, and written or quantized."""

import functools
import math
from collections.abc import Sequence

from pallas_kernels.attention.hopper_memory import MOST_GROUP, REGISTER_PITCH_WORDS, Memory
from pallas_kernels.mosaic.lanes import Word
from pallas_kernels.mosaic.math import WIDE_CODE_LIMIT


class Output(Memory):
    """A unit's end."""

    def _rounded(self, values: Sequence[Word]) -> list[Word]:
        """As the dtype of queries holds them."""
        o, dtype = self.o, self.p.dtype
        return [x for i in range(0, len(values), 2) for x in o.unpair(dtype, o.pair(dtype, *values[i : i + 2]))]

    # The end.

    def _leave(self, carry: Sequence[Word]) -> None:
        """A warp's part, for all warps to see."""
        o, p = self.o, self.p
        best, total, *outputs = carry
        for distance in (1, 2):
            total = total + o.across(total, distance)
        for i, x in enumerate(outputs):
            self._keep_shared("sums", (self.warp * (p.dim // 4) + i) * REGISTER_PITCH_WORDS + self.lane, x)
        with o.when(self.column < 1):
            at = self.warp * (2 * MOST_GROUP) + self.row
            self._keep_shared("statistics", at, best)
            self._keep_shared("statistics", at + MOST_GROUP, total)

    def _together(self, query: Word, channel: Word) -> tuple[Word, Word]:
        """An output, and the logarithm of its sum to the base of 2."""
        o, p = self.o, self.p
        row, inside = channel // self.piece, channel % self.piece
        register = (inside << 1) + (query & 1)
        lane = row * 4 + (query >> 1)

        def real(name: str, index: Word) -> Word:
            return o.as_real(self._shared(name, index)[0])

        statistics = [query + warp * 2 * MOST_GROUP for warp in range(p.cut.warps + 1)]
        best = [real("statistics", at) for at in statistics]
        highest = functools.reduce(o.maximum, best)
        shares = [o.exp2(x - highest) for x in best]
        sums = [
            real("sums", (register + warp * (p.dim // 4)) * REGISTER_PITCH_WORDS + lane) for warp in range(p.cut.warps)
        ]
        sums.append(real("new", channel + p.dim))
        total = output = o.constant(0.0)
        for at, share, found in zip(statistics, shares, sums, strict=True):
            total = total + real("statistics", at + MOST_GROUP) * share
            output = output + found * share
        there = total > 0.0
        output = output * o.reciprocal(o.select(there, total, o.constant(1.0)))
        log_sum = o.select(there, highest + o.log2(o.select(there, total, o.constant(1.0))), o.constant(-math.inf))
        return output, log_sum

    def _finish(self, multipliers: Sequence[Word], beyond: Sequence[Word]) -> None:
        """Writes what all warps found."""
        o, p = self.o, self.p
        channels = p.group * p.dim
        for i, (number, there) in enumerate(self._dealt(channels)):
            at = number if there is None else o.minimum(number, o.constant(channels - 1))
            query, channel = at // p.dim, at % p.dim
            output, log_sum = self._together(query, channel)
            with self._only(there):
                if p.qmax:
                    self._write_code(at, output, multipliers[i])
                    continue
                part = (self.batch * p.kv_heads + self.head) * p.splits + self.split
                if p.splits == 1:
                    word = o.pair(p.dtype, output, output)
                    o.store(self.found[0], (part * channels + at) * 2, word, nbytes=2)
                    continue
                o.store(self.found[0], (part * channels + at) * 4, output)
                with o.when(channel < 1):
                    o.store(self.found[1], (part * p.group + query) * 4, log_sum * math.log(2))
        if p.extra:
            self._synchronize()
            self._write_extra(beyond)

    # Codes.

    def _multipliers(self) -> tuple[list[Word], list[Word]]:
        """Of this thread's channels, and of what its extra ones continue; read when there are registers again."""
        o, p = self.o, self.p
        if not p.qmax:
            return [], []
        channels = p.group * p.dim
        places = [
            self.head * channels + o.minimum(number, o.constant(channels - 1)) for number, _ in self._dealt(channels)
        ]
        sources = [
            self._shared("extra", o.minimum(number, o.constant(p.extra - 1)))[0] for number, _ in self._dealt(p.extra)
        ]
        own, beyond = ([o.as_real(o.load(self.recipe[0], at * 4)[0]) for at in some] for some in (places, sources))
        return own, beyond

    def _between(self, x: Word, low: float, high: float) -> Word:
        return self.o.maximum(self.o.minimum(x, self.o.constant(high)), self.o.constant(low))

    def _code(self, output: Word, multiplier: Word) -> Word:
        """Of an output as its dtype holds it, at most 16 bits."""
        limit = float(WIDE_CODE_LIMIT)
        return self.o.rounded(self._between(self._rounded([output, output])[0] * multiplier, -limit, limit))

    def _write_code(self, at: Word, output: Word, multiplier: Word) -> None:
        o, p = self.o, self.p
        code = self._code(output, multiplier)
        if p.extra:
            self._keep_shared("outputs", at, output)
        to = self._coded(self.head * (p.group * p.dim) + at)
        o.store(self.found[0], to, self._between(code, -p.qmax, p.qmax), nbytes=1)

    def _coded(self, channel: Word) -> Word:
        """Where a code goes."""
        return self.batch * (self.p.kv_heads * self.p.group * self.p.dim + self.p.extra) + channel

    def _write_extra(self, multipliers: Sequence[Word]) -> None:
        """The extra channels that continue this head's."""
        o, p = self.o, self.p
        channels = p.group * p.dim
        for (number, there), multiplier in zip(self._dealt(p.extra), multipliers, strict=True):
            with self._only(there):
                source, part = (self._shared("extra", number + i * p.extra)[0] for i in range(2))
                source = source - self.head * channels
                own = (source >= 0) & (source < channels)
                output = o.as_real(self._shared("outputs", self._between(source, 0, channels - 1))[0])
                code = self._code(output, multiplier)
                full = o.minimum(part, o.constant(WIDE_CODE_LIMIT)) * p.qmax
                beyond = self._between(o.maximum(code, 0 - code) - full, 0, p.qmax)
                beyond = o.select(code < 0, 0 - beyond, beyond)
                with o.when(own):
                    to = self._coded(number + p.kv_heads * channels)
                    o.store(self.found[0], to, beyond, nbytes=1)
