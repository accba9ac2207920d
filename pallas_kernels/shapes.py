"""Shapes of the linear layers of well-known models, which the benchmark and the tuning share."""

SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3-8B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "Llama-3-70B": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
    "OPT-30B": {"qkv": (21504, 7168), "o": (7168, 7168), "fc1": (28672, 7168), "fc2": (7168, 28672)},
}
"""Model to layer to (N, K): output and input channels."""

ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
"""Rows of activations: from one decoded token to a batch of prompts."""
