"""The two kernels of the integer matmuls behind one function, chosen by the kind of configuration."""

from pallas_kernels.matmul.hopper import decode, gemm
from pallas_kernels.matmul.hopper.decode import DecodeConfig
from pallas_kernels.matmul.hopper.gemm import GemmConfig
from pallas_kernels.matmul.hopper.problem import Problem
from pallas_kernels.mosaic.compat import Kernel

Config = GemmConfig | DecodeConfig


def build(p: Problem, config: Config) -> Kernel:
    """The kernel of a configuration: a function of (w, x, w_scale, x_scale, scales of groups and bias if any)."""
    return decode.build(p, config) if isinstance(config, DecodeConfig) else gemm.build(p, config)


def fits(p: Problem, config: Config) -> bool:
    """Whether a kernel can be built with this configuration."""
    try:
        build(p, config)
    except (NotImplementedError, ValueError):
        return False
    return True


def token_tile(p: Problem, config: Config) -> int:
    """Rows of x in a tile."""
    return decode.token_tile(p.rows_at_once) if isinstance(config, DecodeConfig) else config.tokens
