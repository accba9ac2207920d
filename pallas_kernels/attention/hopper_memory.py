"""Device and shared memory as a unit of warps sees them in attention (:mod:`pallas_kernels.attention.hopper_unit`)."""

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from pallas_kernels.attention.hopper_cut import TILE_POSITIONS, Cut
from pallas_kernels.attention.problem import Problem
from pallas_kernels.mosaic.compat import ir
from pallas_kernels.mosaic.lanes import Lanes, Word

MOST_GROUP = 8
"""Query heads that share a key-value head, at most."""
REGISTER_PITCH_WORDS = 33
"""Words from one register's place in shared memory to the next one's: so lanes read from as many banks as they can."""


def shared_words(p: Problem[Cut]) -> dict[str, int]:
    """Shared memory of a unit by name, in words.

    The codes of its queries, twice each, new key and new value, and the size of each; the real values of the last two; each
    warp's sums and statistics, the new token's after them; and for extra channels the outputs that they continue.
    """
    rows = p.group + 2
    found = {"codes": 2 * rows * p.dim // 4, "sizes": rows, "new": 2 * p.dim}
    found |= {
        "sums": p.cut.warps * (p.dim // 4) * REGISTER_PITCH_WORDS,
        "statistics": (p.cut.warps + 1) * 2 * MOST_GROUP,
    }
    return found | ({"outputs": p.group * p.dim, "extra": 2 * p.extra} if p.extra else {})


class Memory:
    """A unit's place among the others, its reads and writes.

    Args:
      lanes: emits its instructions.
      p: what the kernel is made for, with a :class:`pallas_kernels.attention.hopper_cut.Cut`.
      cta: number of the CTA, which has several units.
      inputs, outputs: references to what the kernel takes and gives.
      shared: to what :func:`shared_words` describes.
    """

    def __init__(
        self,
        lanes: Lanes,
        p: Problem[Cut],
        cta: Word,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        shared: Mapping[str, ir.Value],
    ):
        self.o, self.p, self.shared = lanes, p, shared
        self.words = shared_words(p)
        self.lengths, *rest = inputs
        self.table, (self.qkv, *rest) = (rest[0], rest[1:]) if p.page else (None, rest)
        self.rotation, rest = rest[: 2 * p.rotates], rest[2 * p.rotates :]
        self.cache, self.recipe = rest[:4], rest[4:]
        self.written, self.found = outputs[:4], outputs[4:]
        threads = 32 * p.cut.warps
        self.unit, self.thread = lanes.thread() // threads, lanes.thread() % threads
        unit = cta * p.cut.units + self.unit
        self.head, rest = unit % p.kv_heads, unit // p.kv_heads
        self.split, self.batch = rest % p.splits, rest // p.splits
        self.warp, self.lane = self.thread >> 5, self.thread & 31
        self.row, self.column = self.lane >> 2, self.lane & 3  # of a fragment
        self.number = self.split * p.cut.warps + self.warp  # among all warps of this sequence and head
        self.warps = p.splits * p.cut.warps
        self.piece = p.dim // 8  # channels of either half of a key that a lane has, and of a value

    def _dealt(self, count: int) -> list[tuple[Word, Word | None]]:
        """This thread's share of ``count`` things: (number, whether there is such a one), several times."""
        threads = 32 * self.p.cut.warps
        return [
            (self.thread + at, None if at + threads <= count else self.thread + at < count)
            for at in range(0, count, threads)
        ]

    def _only(self, condition: Word | None) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if condition is None else self.o.when(condition)

    # Shared memory, of which every unit has its own.

    def _shared(self, name: str, index: Word, count: int = 1) -> tuple[Word, ...]:
        return self.o.load_shared(self.shared[name], index + self.unit * self.words[name], count)

    def _keep_shared(self, name: str, index: Word, word: Word, nbytes: int = 4) -> None:
        first = self.unit * (self.words[name] * (4 if nbytes == 2 else 1))
        self.o.store_shared(self.shared[name], index + first, word, nbytes)

    def _synchronize(self) -> None:
        self.o.synchronize(self.unit, 32 * self.p.cut.warps)

    # Device memory.

    def _words(self, ref: ir.Value, offset: Word, nbytes: int) -> list[Word]:
        """So many neighbouring bytes, 16 at a time at most."""
        count = min(nbytes // 4, 4)
        return [word for at in range(0, nbytes, 4 * count) for word in self.o.load(ref, offset + at, count)]

    def _shift(self, position: Word) -> Word | None:
        """What is added to a position to have its row in a pool of pages, the same for all of a page; None without pages."""
        p, o = self.p, self.o
        if self.table is None:
            return None
        number = position // p.page
        (page,) = o.load(self.table, (self.batch * p.table + number) * 4)
        return (page - number) * p.page

    def _tile_shift(self, tile: Word, last: Word) -> Word | None:
        """:meth:`_shift` for a tile's positions, none of which is after the last; a tile is part of one page."""
        return None if self.table is None else self._shift(self.o.minimum(tile * TILE_POSITIONS, last))

    def _cached(self, position: Word, nbytes: int, shift: Word | None) -> Word:
        """Offset of a position's entry, of which a head has so many bytes, by what :meth:`_shift` gives."""
        before = self.batch * self.p.capacity if shift is None else shift
        return ((before + position) * self.p.kv_heads + self.head) * nbytes

    def _keys(self, tile: Word, last: Word, shift: Word | None) -> list[Word]:
        """A tile's keys, positions 0 to 7 and 8 to 15; and both scales of one position for every lane, in turns."""
        o, found = self.o, []
        for rows in (0, 8):
            position = o.minimum(tile * TILE_POSITIONS + self.row + rows, last)
            offset = self._cached(position, self.p.dim, shift) + self.column * self.piece
            for half in (0, self.p.dim // 2):
                found += self._words(self.cache[0], offset + half, self.piece)
        position = o.minimum(tile * TILE_POSITIONS + (self.lane & (TILE_POSITIONS - 1)), last)
        return [*found, *(o.load(ref, self._cached(position, 4, shift))[0] for ref in self.cache[2:])]

    def _values(self, tile: Word, last: Word, shift: Word | None) -> list[Word]:
        """A tile's values: the channels of the lane's row, of the four positions of its column."""
        o, found = self.o, []
        for position in (0, 1, 8, 9):
            position = o.minimum(tile * TILE_POSITIONS + self.column * 2 + position, last)
            offset = self._cached(position, self.p.dim, shift) + self.row * self.piece
            found += self._words(self.cache[1], offset, self.piece)
        return found

    # The new token: queries, a key and a value.

    def _angles(self) -> list[list[Word]]:
        """Cosines and sines of a lane's two channels."""
        o = self.o
        offset = (self.batch * (self.p.dim // 2) + self._pair()) * 4
        return [[o.as_real(word) for word in o.load(ref, offset, 2)] for ref in self.rotation]

    def _new_rows(self) -> list[list[Word]]:
        """The rows of this head that are new, one for each warp: words of two neighbouring channels of either half.

        They are the queries, then the key and the value; where there are fewer warps, they have several one after the other.
        """
        p, o, found = self.p, self.o, []
        heads = p.kv_heads * p.group
        for first in range(0, p.group + 2, p.cut.warps):
            task = self.warp + first
            of_cache = (task - p.group) * p.kv_heads + heads + self.head
            head = o.select(task < p.group, self.head * p.group + task, of_cache)
            head = o.minimum(head, o.constant(heads + 2 * p.kv_heads - 1))  # Of warps without a task.
            row = ((self.batch * (heads + 2 * p.kv_heads) + head) * p.dim + self._pair()) * 2
            found.append([word for at in (0, p.dim) for word in o.load(self.qkv, row + at)])
        return found

    def _pair(self) -> Word:
        """The first of a lane's two neighbouring channels of a half; lanes beyond it repeat others."""
        return (self.lane << 1) & (self.p.dim // 2 - 1)

    # Recipes of codes.

    def _extra_channels(self) -> list[list[Word]]:
        """Source and part of this thread's."""
        o, p = self.o, self.p
        numbers = [o.minimum(number, o.constant(p.extra - 1)) for number, _ in self._dealt(p.extra)]
        return [[o.load(ref, number * 4)[0] for ref in self.recipe[1:]] for number in numbers]

    def _keep_extra_channels(self, words: Sequence[Sequence[Word]]) -> None:
        """Leaves them in shared memory until they are needed."""
        for (number, there), recipe in zip(self._dealt(self.p.extra), words, strict=True):
            with self._only(there):
                for i, word in enumerate(recipe):
                    self._keep_shared("extra", number + i * self.p.extra, word)
