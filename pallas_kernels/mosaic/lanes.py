"""Single lanes of a warp: the language of kernels whose every register has its place in a tensor-core fragment.

A kernel takes a :class:`Lanes`, which emits machine instructions, and works with 32-bit values, one in every lane, by
Python's operators.  NumPy arrays with an element for every thread have the same operators, so another object with the same
methods can run a kernel on a CPU, lane by lane; tests do.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
from jaxtyping import DTypeLike

from pallas_kernels.mosaic.compat import FragmentedArray, arith, ir, llvm, mgpu, ptx
from pallas_kernels.mosaic.registers import i32, shared_address

EVERY_LANE = "0xffffffff"
FIRST_BARRIER = 12
"""Number of the first barrier used, of the 16 in hardware; Pallas takes them from the other end."""


Emit = Callable[..., ir.Value]
"""Emits an operation on two values."""


class Word:
    """A value that each lane has: int32, float32, or a condition.

    Its operators are those of NumPy's arrays: integers wrap, a shift to the right keeps the sign.
    """

    def __init__(self, value: ir.Value):
        self.value = value

    @property
    def floats(self) -> bool:
        return isinstance(self.value.type, ir.F32Type)

    def _same(self, other: "Word | float") -> ir.Value:
        if isinstance(other, Word):
            return other.value
        return arith.constant(self.value.type, float(other)) if self.floats else i32(int(other))

    def _by(
        self,
        ints: Callable[..., ir.Value],
        floats: Callable[..., ir.Value],
        other: "Word | float",
        swapped: bool = False,
    ) -> "Word":
        operands = (self.value, self._same(other))[:: -1 if swapped else 1]
        if not self.floats:
            return Word(ints(*operands))
        return Word(floats(*operands, fastmath=ir.Attribute.parse("#arith.fastmath<contract>")))

    def __add__(self, other: "Word | float") -> "Word":
        return self._by(arith.addi, arith.addf, other)

    def __sub__(self, other: "Word | float") -> "Word":
        return self._by(arith.subi, arith.subf, other)

    def __mul__(self, other: "Word | float") -> "Word":
        return self._by(arith.muli, arith.mulf, other)

    def __rsub__(self, other: "Word | float") -> "Word":
        return self._by(arith.subi, arith.subf, other, swapped=True)

    def __and__(self, other: "Word | float") -> "Word":
        return Word(arith.andi(self.value, self._same(other)))

    def __xor__(self, other: "Word | float") -> "Word":
        return Word(arith.xori(self.value, self._same(other)))

    def __lshift__(self, other: "Word | float") -> "Word":
        return Word(arith.shli(self.value, self._same(other)))

    def __rshift__(self, other: "Word | float") -> "Word":
        return Word(arith.shrsi(self.value, self._same(other)))

    def __floordiv__(self, other: int) -> "Word":
        """Of what is not negative."""
        return Word(arith.divui(self.value, i32(other)))

    def __mod__(self, other: int) -> "Word":
        """Of what is not negative."""
        return Word(arith.remui(self.value, i32(other)))

    def _compared(self, how: str, other: "Word | float") -> "Word":
        if self.floats:
            return Word(arith.cmpf(getattr(arith.CmpFPredicate, "O" + how), self.value, self._same(other)))
        return Word(arith.cmpi(getattr(arith.CmpIPredicate, "s" + how.lower()), self.value, self._same(other)))

    def __lt__(self, other: "Word | float") -> "Word":
        return self._compared("LT", other)

    def __ge__(self, other: "Word | float") -> "Word":
        return self._compared("GE", other)

    def __gt__(self, other: "Word | float") -> "Word":
        return self._compared("GT", other)


class Lanes:
    """Emits a kernel's instructions, inside ``plgpu.inline_mgpu``."""

    def constant(self, value: float) -> Word:
        """int32 or float32, as Python's is."""
        return Word(arith.constant(ir.F32Type.get(), value) if isinstance(value, float) else i32(value))

    def thread(self) -> Word:
        """Number in the CTA."""
        return Word(mgpu.utils.thread_idx())

    def place(self, scalar: FragmentedArray) -> Word:
        """An int32 scalar of the kernel."""
        return Word(scalar.registers.item())

    # Memory.  Offsets are in bytes.

    def load(self, ref: ir.Value, offset: Word, count: int = 1) -> tuple[Word, ...]:
        """1, 2 or 4 neighbouring words of device memory that nobody writes meanwhile."""
        vector, places = self._vector(count)
        code = f"ld.global.nc.L1::no_allocate{vector}.b32 {places}, [${count}];"
        return tuple(map(Word, ptx(code, self._address(ref, offset), results=count)))

    def store(self, ref: ir.Value, offset: Word, word: Word, nbytes: int = 4) -> None:
        """Writes a word to device memory, or its lowest bytes."""
        self._write("global", self._address(ref, offset), word, nbytes)

    def _write(self, where: str, address: ir.Value, word: Word, nbytes: int) -> None:
        code = {
            1: "st.{}.b8 [$0], $1;",
            2: "{{ .reg .b16 x, y; mov.b32 {{x, y}}, $1; st.{}.b16 [$0], x; }}",
            4: "st.{}.b32 [$0], $1;",
        }[nbytes]
        ptx(code.format(where), address, self._bits(word))

    def _vector(self, count: int) -> tuple[str, str]:
        places = ", ".join(f"${i}" for i in range(count))
        return (f".v{count}", f"{{{places}}}") if count > 1 else ("", places)

    def load_shared(self, ref: ir.Value, index: Word, count: int = 1) -> tuple[Word, ...]:
        """1, 2 or 4 neighbouring words of shared memory, from the ``index``-th on."""
        address = (Word(shared_address(ref)) + index * 4).value
        vector, places = self._vector(count)
        return tuple(map(Word, ptx(f"ld.shared{vector}.b32 {places}, [${count}];", address, results=count)))

    def store_shared(self, ref: ir.Value, index: Word, word: Word, nbytes: int = 4) -> None:
        """Writes a word there, or its lower half, of which ``index`` counts bytes."""
        address = (Word(shared_address(ref)) + (index * 4 if nbytes == 4 else index)).value
        self._write("shared", address, word, nbytes)

    def synchronize(self, barrier: Word, threads: int) -> None:
        """So many threads that name the same barrier, one of 0 to 3, see what each has written to shared memory."""
        ptx(
            f"{{ .reg .b32 x; add.s32 x, $0, {FIRST_BARRIER}; barrier.sync.aligned x, {threads}; }}",
            barrier.value,
            convergent=True,
        )

    def _address(self, ref: ir.Value, offset: Word) -> ir.Value:
        wide = ir.IntegerType.get_signless(64)
        return arith.addi(llvm.ptrtoint(wide, mgpu.utils.memref_ptr(ref)), arith.extui(wide, offset.value))

    # What flows between lanes, and through conditions and loops.

    def shuffle(self, x: Word, lane: Word) -> Word:
        """The value of another lane of the warp."""
        code = f"shfl.sync.idx.b32 $0, $1, $2, 31, {EVERY_LANE};"
        return self._like(x, *ptx(code, self._bits(x), lane.value, results=1, convergent=True))

    def across(self, x: Word, distance: int) -> Word:
        """The value of the lane whose number differs in one bit."""
        code = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, {EVERY_LANE};"
        return self._like(x, *ptx(code, self._bits(x), results=1, convergent=True))

    def select(self, condition: Word, yes: Word, no: Word) -> Word:
        return Word(arith.select(condition.value, yes.value, no.value))

    @contextlib.contextmanager
    def when(self, condition: Word) -> Iterator[None]:
        """Only some lanes do what follows."""
        with mgpu.utils.when(condition.value):
            yield

    def repeat(self, count: Word, body: Callable[[Word, list[Word]], list[Word]], carry: Sequence[Word]) -> list[Word]:
        """A loop of ``count`` turns, as many for all lanes of a warp."""

        @mgpu.utils.fori(count.value, [word.value for word in carry])
        def loop(turn: ir.Value, values: Sequence[ir.Value]) -> list[ir.Value]:
            return [word.value for word in body(Word(turn), [Word(value) for value in values])]

        return [Word(value) for value in loop.results]

    # Arithmetic that has no operator.

    def maximum(self, a: Word, b: Word) -> Word:
        """The larger; of a number and what is none, the number."""
        return Word((arith.maxnumf if a.floats else arith.maxsi)(a.value, b.value))

    def minimum(self, a: Word, b: Word) -> Word:
        return Word((arith.minnumf if a.floats else arith.minsi)(a.value, b.value))

    def rounded(self, x: Word) -> Word:
        """The nearest integer, half to even."""
        return Word(ptx("{ .reg .f32 x; mov.b32 x, $1; cvt.rni.s32.f32 $0, x; }", self._bits(x), results=1)[0])

    def real(self, x: Word) -> Word:
        """An integer as float32."""
        return Word(arith.sitofp(ir.F32Type.get(), x.value))

    def as_real(self, x: Word) -> Word:
        """The float32 that has these bits."""
        return Word(mgpu.utils.bitcast(x.value, ir.F32Type.get()))

    def exp2(self, x: Word) -> Word:
        return self._approximate("ex2.approx.ftz.f32", x)

    def log2(self, x: Word) -> Word:
        return self._approximate("lg2.approx.f32", x)

    def reciprocal(self, x: Word) -> Word:
        return self._approximate("rcp.approx.f32", x)

    def _approximate(self, name: str, x: Word) -> Word:
        code = f"{{ .reg .f32 x; mov.b32 x, $1; {name} x, x; mov.b32 $0, x; }}"
        return self._like(x, *ptx(code, self._bits(x), results=1))

    # Several small numbers in a word, the first in its lowest bits.

    def pair(self, dtype: DTypeLike, low: Word, high: Word) -> Word:
        """Two float32 as two float16 or bfloat16."""
        name = {jnp.float16: "f16x2", jnp.bfloat16: "bf16x2"}[jnp.dtype(dtype).type]
        code = f"{{ .reg .f32 x, y; mov.b32 x, $1; mov.b32 y, $2; cvt.rn.{name}.f32 $0, y, x; }}"
        return Word(ptx(code, self._bits(low), self._bits(high), results=1)[0])

    def unpair(self, dtype: DTypeLike, word: Word) -> tuple[Word, Word]:
        """The float32 of such a pair."""
        if jnp.dtype(dtype) == jnp.bfloat16:
            return self.as_real(word << 16), self.as_real(word & -(1 << 16))
        code = (
            "{ .reg .b16 x, y; .reg .f32 u, v; mov.b32 {x, y}, $2; cvt.f32.f16 u, x; cvt.f32.f16 v, y; "
            "mov.b32 $0, u; mov.b32 $1, v; }"
        )
        low, high = ptx(code, word.value, results=2)
        return self.as_real(Word(low)), self.as_real(Word(high))

    def bytes_of(self, a: Word, b: Word, selector: int) -> Word:
        """Four of the eight bytes of two words, named by the selector's four hexadecimal digits, the lowest byte last."""
        return Word(mgpu.utils.prmt(a.value, b.value, i32(selector)))

    def minus_halves(self, a: Word, b: int) -> Word:
        """Two float16 less two others."""
        return Word(ptx("sub.rn.f16x2 $0, $1, $2;", a.value, i32(b), results=1)[0])

    def multiply_codes(self, sums: Sequence[Word], a: Sequence[Word], b: Sequence[Word]) -> list[Word]:
        """mma.m16n8k32 of int8: adds to int32."""
        return self._multiply("m16n8k32.row.col.s32.s8.s8.s32", sums, a, b)

    def multiply_halves(self, sums: Sequence[Word], a: Sequence[Word], b: Sequence[Word]) -> list[Word]:
        """mma.m16n8k16 of float16: adds to float32."""
        return self._multiply("m16n8k16.row.col.f32.f16.f16.f32", sums, a, b)

    def _multiply(self, kind: str, sums: Sequence[Word], a: Sequence[Word], b: Sequence[Word]) -> list[Word]:
        floats = sums[0].floats
        code = f"""{{
            .reg .{"f32" if floats else "b32"} d0, d1, d2, d3;
            mov.b32 d0, $4; mov.b32 d1, $5; mov.b32 d2, $6; mov.b32 d3, $7;
            mma.sync.aligned.{kind} {{d0, d1, d2, d3}}, {{$8, $9, $10, $11}}, {{$12, $13}}, {{d0, d1, d2, d3}};
            mov.b32 $0, d0; mov.b32 $1, d1; mov.b32 $2, d2; mov.b32 $3, d3;
            }}"""
        operands = [self._bits(word) for word in (*sums, *a, *b)]
        found = [Word(value) for value in ptx(code, *operands, results=4, convergent=True)]
        return [self.as_real(word) for word in found] if floats else found

    def _bits(self, word: Word) -> ir.Value:
        return mgpu.utils.bitcast(word.value, ir.IntegerType.get_signless(32)) if word.floats else word.value

    def _like(self, x: Word, found: ir.Value) -> Word:
        return self.as_real(Word(found)) if x.floats else Word(found)
