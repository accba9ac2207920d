"""How programs are compiled, and where they are kept.

Those of a conversion multiply large float32 matrices, of each shape a few times.  For a GPU XLA would try several kernels
for every product, which can take longer than all the products do; told not to try any, jax 0.11 takes kernels of its own
with tiles of 16 x 8, as the compiled programs show.  The products of cuBLAS need no trial.
"""

import functools
from pathlib import Path

import jax

from fqjax.runtime.errors import InputError
from fqjax.runtime.program_cache import programs_directory

jit = functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0})
"""``jax.jit`` for what a conversion runs.  JAX allows no other jitted function around one that has options."""


def use_compilation_cache(directory: str | Path | None = None) -> Path:
    """Keeps compiled programs in a directory, and takes those from there that another process has compiled.

    It is JAX's own persistent cache; a directory that was given to that before (``JAX_COMPILATION_CACHE_DIR``) is left as it
    is.  Tracing and lowering a program, which take the most time for a model with its layers unrolled, are not saved.

    Args:
      directory: is made where there is none; by default that of the command line
        (:func:`fqjax.runtime.program_cache.programs_directory`).

    Returns:
      The directory in use.

    Raises:
      InputError: if the directory cannot be made.
    """
    if directory is None and (known := jax.config.values["jax_compilation_cache_dir"]):
        return Path(known)
    path = programs_directory() if directory is None else Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot keep compiled programs there ({error.strerror})") from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path
