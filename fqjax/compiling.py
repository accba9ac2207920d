"""How the programs of a conversion are compiled.

They multiply large float32 matrices, of each shape a few times.  For a GPU XLA would try several kernels for every product,
which can take longer than all the products do; told not to try any, jax 0.11 takes kernels of its own with tiles of 16 x 8,
as the compiled programs show.  The products of cuBLAS need no trial.
"""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0})
"""``jax.jit`` for what a conversion runs.  JAX allows no other jitted function around one that has options."""
