"""Compiles kernels for an H200 on a machine without one; needs JAX's CUDA plugin, but no GPU and no driver."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

HAS_PLUGIN = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # There is no driver whose version could be checked.

DEVICE = """
name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000 device_memory_size: 150000000000
l2_cache_size: 52428800 shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
registers_per_core_limit: 65536 registers_per_block_limit: 65536
threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
device_address_bits: 64 ecc_enabled: true driver_version: "13.0.0" runtime_version: "13.0.0"
compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
"""
TARGET = f"""
gpu_device_info {{ {DEVICE} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "NVIDIA H200"
"""


def compile_for_h200(f, *arguments, donate=()):
    """Compiles ``f`` for arrays like ``arguments`` as far as machine code; the numbers of those that are donated follow."""
    target = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=TARGET, topology="1x1x1")
    mesh = topologies.make_mesh(target, (1,), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f, donate_argnums=donate).lower(*abstract).compile()


def spilled_bytes(log):
    """Of every kernel that the assembler's output tells of: (stack frame, spill stores, spill loads)."""
    found = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return [tuple(map(int, row)) for row in found]
