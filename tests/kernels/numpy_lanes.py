"""Runs kernels written for :class:`pallas_kernels.mosaic.lanes.Lanes` on the CPU: every value is an array over the threads.

Fragments of the tensor cores' operands are put together as NVIDIA's PTX manual lays them out, and multiplied by NumPy.
"""

import contextlib

import numpy as np

INT, REAL = np.int32, np.float32


def _bits(x):
    return np.ascontiguousarray(x).view(INT)


class NumpyLanes:
    """The lanes of one CTA."""

    def __init__(self, threads):
        self.threads = threads
        self.active = np.ones(threads, bool)

    def constant(self, value):
        return np.full(self.threads, value, REAL if isinstance(value, float) else INT)

    def thread(self):
        return np.arange(self.threads, dtype=INT)

    def load(self, ref, offset, count=1):
        assert (offset % (4 * count) == 0).all()
        flat = ref.reshape(-1).view(INT)
        at = np.where(self.active, offset // 4, 0)
        assert ((at >= 0) & (at + count <= flat.size)).all()
        return tuple(flat[at + i] for i in range(count))

    def store(self, ref, offset, word, nbytes=4):
        flat = ref.reshape(-1).view(np.uint8)
        assert (offset[self.active] % nbytes == 0).all()
        for byte in range(nbytes):
            values = (_bits(word) >> (8 * byte)).astype(np.uint8)
            flat[(offset + byte)[self.active]] = values[self.active]

    def load_shared(self, ref, index, count=1):
        at = np.where(self.active, index, 0)
        assert (at % count == 0).all()
        return tuple(ref[at + i] for i in range(count))

    def store_shared(self, ref, index, word, nbytes=4):
        self.store(ref, index * 4 if nbytes == 4 else index, word, nbytes)

    def synchronize(self, barrier, threads):
        assert self.active.all()

    def shuffle(self, x, lane):
        assert self.active.reshape(-1, 32).all(1).sum() * 32 == self.active.sum()
        return x[np.arange(self.threads) // 32 * 32 + lane]

    def across(self, x, distance):
        return self.shuffle(x, (np.arange(self.threads) % 32) ^ distance)

    def select(self, condition, yes, no):
        return np.where(condition, yes, no)

    @contextlib.contextmanager
    def when(self, condition):
        before = self.active
        self.active = before & condition
        yield
        self.active = before

    def repeat(self, count, body, carry):
        before, carry = self.active, list(carry)
        for turn in range(int(count.max(initial=0))):
            self.active = before & (turn < count)
            found = body(np.full(self.threads, turn, INT), carry)
            for old, new in zip(carry, found, strict=True):
                assert old.dtype == new.dtype
            carry = [np.where(self.active, new, old) for old, new in zip(carry, found, strict=True)]
        self.active = before
        return carry

    def maximum(self, a, b):
        return np.fmax(a, b)

    def minimum(self, a, b):
        return np.fmin(a, b)

    def rounded(self, x):
        return np.rint(x).astype(INT)

    def real(self, x):
        return x.astype(REAL)

    def as_real(self, x):
        return np.ascontiguousarray(x).view(REAL)

    def exp2(self, x):
        return np.exp2(x)

    def log2(self, x):
        return np.log2(x)

    def reciprocal(self, x):
        return (1 / x).astype(REAL)

    def pair(self, dtype, low, high):
        both = np.stack([np.asarray(x).astype(dtype) for x in (low, high)], axis=1)
        return np.ascontiguousarray(both).view(INT)[:, 0]

    def unpair(self, dtype, word):
        both = np.ascontiguousarray(word)[:, None].view(dtype).astype(REAL)
        return both[:, 0], both[:, 1]

    def bytes_of(self, a, b, selector):
        eight = np.stack([a, b], axis=1).astype(INT).view(np.uint8)
        picked = eight[:, [selector >> (4 * i) & 7 for i in range(4)]]
        return np.ascontiguousarray(picked).view(INT)[:, 0]

    def minus_halves(self, a, b):
        return (a.view(np.float16) - np.full(self.threads, b, INT).view(np.float16)).view(INT)

    def multiply_codes(self, sums, a, b):
        return self._multiply(sums, a, b, np.int8, 32, INT)

    def multiply_halves(self, sums, a, b):
        return self._multiply(sums, a, b, np.float16, 16, REAL)

    def _multiply(self, sums, a, b, dtype, k, out):
        """D = A (16, k) B (k, 8) + C: lane 4 r + c has rows r and r + 8 of A, and 4 bytes of a row from 4 c on, and so on."""
        lane = np.arange(32)
        row, column, each = lane >> 2, lane & 3, 4 // np.dtype(dtype).itemsize
        found = [np.zeros(self.threads, out) for _ in range(4)]
        for warp in range(self.threads // 32):
            here = slice(32 * warp, 32 * warp + 32)
            left, right, c = np.zeros((16, k), np.float64), np.zeros((k, 8), np.float64), np.zeros((16, 8), np.float64)
            for i, word in enumerate(a):
                parts = np.ascontiguousarray(word[here])[:, None].view(dtype)
                for j in range(each):
                    left[row + 8 * (i % 2), each * column + j + k // 2 * (i // 2)] = parts[:, j]
            for i, word in enumerate(b):
                parts = np.ascontiguousarray(word[here])[:, None].view(dtype)
                for j in range(each):
                    right[each * column + j + k // 2 * i, row] = parts[:, j]
            places = [(row + 8 * (i // 2), 2 * column + i % 2) for i in range(4)]
            for at, word in zip(places, sums, strict=True):
                c[at] = word[here]
            product = left @ right + c
            for result, at in zip(found, places, strict=True):
                result[here] = product[at].astype(out)
        return found
