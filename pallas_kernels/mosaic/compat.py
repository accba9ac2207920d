"""Everything that differs between JAX versions, and every private name of Pallas that the kernels need.

Mosaic GPU changes from one JAX release to the next: a default here, a renamed argument there.  The kernels import what
they use of it from this file, so that a new release is looked at in one place.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as _plgpu
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as _mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

__all__ = [
    "arith",
    "interpret_params",
    "ir",
    "kernel",
    "kernel_in_place",
    "llvm",
    "load",
    "memref",
    "mgpu",
    "plgpu",
    "ptx",
    "start_profiler",
    "stop_profiler",
    "store_transposed",
    "vector",
    "version",
]


plgpu: Any = _plgpu  # Their annotations are not written for type checkers.
mgpu: Any = _mgpu


def _version() -> tuple[int, int]:
    major, minor, *_ = jax.__version__.split(".")
    return int(major), int(minor)


version = _version()
"""(major, minor) of JAX."""


def interpret_params() -> Any:
    """What makes ``plgpu.kernel`` run in NumPy on a CPU.

    Raises:
      NotImplementedError: on JAX before 0.11, whose interpreter lacks what the kernels use.
    """
    if version < (0, 11):
        raise NotImplementedError(
            f"Mosaic GPU kernels run in interpret mode from jax 0.11 on, this is {jax.__version__}"
        )
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def kernel(body: Any, *, out_type: Any, scratch_types: Any, **settings: Any) -> Any:
    """``plgpu.kernel`` with lane-level lowering and without automatic barriers: the kernels place their own."""
    return plgpu.kernel(body, out_type=out_type, scratch_types=scratch_types, compiler_params=_params(), **settings)


def _params() -> Any:
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,  # 0.11 changed the default to warpgroups.
        unsafe_no_auto_barriers=True,
    )


def kernel_in_place(
    body: Any, *, out_type: Any, aliases: dict[int, int], scratch_types: Any, num_threads: int, **mesh: Any
) -> Any:
    """The same, where some operands become results, which ``plgpu.kernel`` does not offer.

    Args:
      body: takes operands, results and scratch memory.
      out_type: a list.
      aliases: number of an operand to number of the result that it becomes.
      scratch_types: a dict.
      num_threads: warpgroups of a CTA.
      mesh: its grid and what the axes are called.
    """
    from jax._src.pallas import mpmd

    grid = plgpu.Mesh(**mesh, num_threads=num_threads, thread_name="warpgroup")

    def scoped(*refs: Any) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch_types)

    settings: dict[str, Any] = {"input_output_aliases": aliases, "compiler_params": _params(), "name": body.__name__}
    return mpmd._mpmd_map([(grid, scoped)], out_type, **settings)


def load(ref: Any, layout: Any = None, *, optimized: bool = True) -> Any:
    """``plgpu.load`` of a whole reference; 0.10 asks for an index, 0.11 deprecates it."""
    if version < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store_transposed(ref: Any, value: Any) -> None:
    """Writes a warpgroup's accumulators to shared memory, transposed; 0.11 need not move them between lanes first."""
    if version < (0, 11):
        value = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    ref.T[...] = value


def start_profiler() -> None:
    """Begins to record every kernel's time (CUPTI); NVIDIA GPUs only."""
    _extension()._cupti_init()


def stop_profiler() -> list[tuple[str, float]]:
    """Ends what :func:`start_profiler` began: (name, milliseconds) of every kernel since, in order."""
    return _extension()._cupti_get_timings(True)


def _extension() -> Any:
    from jax._src.lib import mosaic_gpu

    found: Any = mosaic_gpu
    return found._mosaic_gpu_ext


def ptx(code: str, *operands: Any, results: int = 0, convergent: bool = False) -> tuple[Any, ...]:
    """Inline PTX with side effects, inside ``plgpu.inline_mgpu``.

    Args:
      code: refers to ``results`` 32-bit results as $0, $1, ... and to the operands after them.
      operands: i32, i64 or i1 values.
      results: how many.
      convergent: whether threads wait for each other in it.
    """
    word = ir.IntegerType.get_signless(32)
    kinds = [{1: "b", 32: "r", 64: "l"}[ir.IntegerType(operand.type).width] for operand in operands]
    settings: dict[str, Any] = {"has_side_effects": True}
    if hasattr(llvm.InlineAsmOp, "convergent"):
        settings["convergent"] = convergent
    kind = llvm.StructType.get_literal([word] * results) if results else ir.Type.parse("!llvm.void")
    value: Any = llvm.inline_asm(kind, list(operands), code, ",".join(["=r"] * results + kinds), **settings)
    return tuple(llvm.extractvalue(word, value, [i]) for i in range(results))
