"""Device times of JAX programs."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

L2_BYTES = 60 * 2**20
"""The largest second-level cache of the GPUs considered."""


def kernel_times(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Runs something and returns (name, microseconds) of every kernel, in order, from the GPU's own clock (CUPTI).

    Where there is no GPU, one entry with the time by the wall clock.
    """
    if jax.default_backend() != "gpu":
        start = time.perf_counter()
        jax.block_until_ready(run())
        return [("wall clock", 1e6 * (time.perf_counter() - start))]
    from pallas_kernels.mosaic import compat

    compat.start_profiler()
    try:
        jax.block_until_ready(run())
    finally:
        times = compat.stop_profiler()
    return [(name, 1e3 * milliseconds) for name, milliseconds in times]


def microseconds(f: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, repeats: int = 5) -> float:
    """Time of one call of ``f``: the median over the rounds of :func:`rounds`."""
    return statistics.median(rounds(f, arguments, repeats=repeats))


def rounds(f: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, repeats: int = 5) -> list[float]:
    """Microseconds of one call of ``f``, all kernels it launches added up, as each round found them.

    Args:
      f: a jitted function.
      arguments: one tuple a call; a round calls ``f`` with each once, so that what they hold together does not stay in
        the cache from one call to the next.
      repeats: rounds.
    """

    def run(times: int) -> None:
        for _ in range(times):
            last = None
            for a in arguments:  # Results are dropped as they come: together they may be larger than the memory.
                last = f(*a)
            jax.block_until_ready(last)

    run(1)  # Compile, and warm up.
    if jax.default_backend() != "gpu":
        return [kernel_times(lambda: run(1))[0][1] / len(arguments) for _ in range(repeats)]
    times = [us for _, us in kernel_times(lambda: run(repeats))]
    each, rest = divmod(len(times), repeats)  # kernels of a round
    if rest:
        raise RuntimeError(f"{len(times)} kernels ran in {repeats} rounds: they are not the same in every round")
    return [sum(times[i : i + each]) / len(arguments) for i in range(0, len(times), each)]


def copies_beyond_cache(nbytes: int, least: int = 2, most: int = 64) -> int:
    """How many arrays of ``nbytes`` hold four times what the cache holds, within limits."""
    return min(most, max(least, -(-4 * L2_BYTES // nbytes)))
