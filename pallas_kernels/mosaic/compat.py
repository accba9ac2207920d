"""Everything that differs between JAX versions, and every private name of Pallas that the kernels need.

Mosaic GPU changes from one JAX release to the next: a default here, a renamed argument there.  The kernels import what
they use of it from this file, so that a new release is looked at in one place.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as _plgpu
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as _mgpu
from jax.experimental.mosaic.gpu import FragmentedArray, LaunchContext
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import memref as _memref
from jaxlib.mlir.dialects import vector as _vector

from pallas_kernels.mosaic.types import Kernel, Layout, Ref, Scalar, Scratch

__all__ = [
    "FragmentedArray",
    "Kernel",
    "LaunchContext",
    "Layout",
    "Ref",
    "Scalar",
    "Scratch",
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


plgpu: Any = _plgpu  # Their annotations are not written for type checkers, or are not there.
mgpu: Any = _mgpu
arith: Any = _arith
llvm: Any = _llvm
memref: Any = _memref
vector: Any = _vector

Outputs = jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct]


def _version() -> tuple[int, int]:
    major, minor, *_ = jax.__version__.split(".")
    return int(major), int(minor)


version = _version()
"""(major, minor) of JAX."""


def interpret_params() -> object:
    """The setting by which ``plgpu.kernel`` runs in NumPy on a CPU.

    Raises:
      NotImplementedError: on JAX before 0.11, whose interpreter lacks what the kernels use.
    """
    if version < (0, 11):
        raise NotImplementedError(
            f"Mosaic GPU kernels run in interpret mode from jax 0.11 on, this is {jax.__version__}"
        )
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def kernel(
    body: Callable[..., None],
    *,
    out_type: Outputs,
    scratch_types: Mapping[str, Scratch],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
    cluster: tuple[str, int] | None = None,
    interpret: object = None,
) -> Kernel:
    """``plgpu.kernel`` with lane-level lowering and without automatic barriers: the kernels place their own.

    Args:
      body: takes references to operands and results, and to scratch memory by keyword.
      out_type, scratch_types, grid, grid_names: as there.
      num_threads: warpgroups of a CTA, along the axis "warpgroup".
      cluster: name of the axis of the CTAs of a cluster, and how many there are; None for one.
      interpret: :func:`interpret_params`, or None.
    """
    settings: dict[str, object] = {"interpret": interpret} if interpret else {}
    if cluster is not None:
        settings |= {"cluster": (cluster[1],), "cluster_names": (cluster[0],)}
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        compiler_params=_params(),
        grid=grid,
        grid_names=grid_names,
        num_threads=num_threads,
        thread_name="warpgroup",
        **settings,
    )


def _params() -> object:
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,  # 0.11 changed the default to warpgroups.
        unsafe_no_auto_barriers=True,
    )


def kernel_in_place(
    body: Callable[..., None],
    *,
    out_type: Sequence[jax.ShapeDtypeStruct],
    aliases: dict[int, int],
    scratch_types: Mapping[str, Scratch],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_threads: int,
) -> Callable[..., tuple[jax.Array, ...]]:
    """:func:`kernel` where some operands become results, which ``plgpu.kernel`` does not offer.

    Args:
      body: takes operands, results and scratch memory.
      out_type: of the results.
      aliases: number of an operand to number of the result that it becomes.
      scratch_types, grid, grid_names, num_threads: as for :func:`kernel`.
    """
    from jax._src.pallas import mpmd

    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, num_threads=num_threads, thread_name="warpgroup")

    def scoped(*refs: Ref) -> None:
        pl.run_scoped(functools.partial(body, *refs), collective_axes="warpgroup", **scratch_types)

    return mpmd._mpmd_map(
        [(mesh, scoped)],
        list(out_type),  # pyright: ignore[reportArgumentType]
        input_output_aliases=aliases,
        compiler_params=_params(),  # pyright: ignore[reportArgumentType]
        name=body.__name__,
    )


def load(ref: Ref, layout: Layout | None = None, *, optimized: bool = True) -> jax.Array:
    """``plgpu.load`` of a whole reference; 0.10 asks for an index, 0.11 deprecates it."""
    if version < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store_transposed(ref: Ref, value: jax.Array) -> None:
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


def ptx(code: str, *operands: ir.Value, results: int = 0, convergent: bool = False) -> tuple[ir.Value, ...]:
    """Inline PTX with side effects, inside ``plgpu.inline_mgpu``.

    Args:
      code: refers to ``results`` 32-bit results as $0, $1, ... and to the operands after them.
      operands: i32, i64 or i1 values.
      results: how many.
      convergent: whether threads wait for each other in it.
    """
    word = ir.IntegerType.get_signless(32)
    kinds = [{1: "b", 32: "r", 64: "l"}[ir.IntegerType(operand.type).width] for operand in operands]
    convergence = {"convergent": convergent} if hasattr(llvm.InlineAsmOp, "convergent") else {}
    kind = llvm.StructType.get_literal([word] * results) if results else ir.Type.parse("!llvm.void")
    constraints = ",".join(["=r"] * results + kinds)
    value = llvm.inline_asm(kind, list(operands), code, constraints, has_side_effects=True, **convergence)
    return tuple(llvm.extractvalue(word, value, [i]) for i in range(results))
