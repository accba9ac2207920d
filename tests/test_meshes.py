"""Models whose arrays lie on a mesh with explicit axes, which is what ``jax.make_mesh`` makes by default."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import contextlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import fqjax
from fqjax.inference.requests import Request
from fqjax.inference.serve import serve
from fqjax.models.llama import Llama, LlamaConfig

sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, max_position_embeddings=64, num_hidden_layers=1)
config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=1)
plain = Llama(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)


def placed(leaf):
    spec = P("x", *[None] * (leaf.ndim - 1)) if leaf.ndim > 1 and leaf.shape[0] % 2 == 0 else P()
    return jax.device_put(leaf, NamedSharding(mesh, spec))


def results(model):
    data = [np.arange(32, dtype=np.int32).reshape(2, 16)]
    report = fqjax.quantize(model, "w8a8", data)[1]
    served = [f.tokens for f in serve(model, [Request(prompt=[5, 6], max_new_tokens=3)], slots=2, capacity=16)]
    tokens = fqjax.generate(model, [5, 6, 7], 3)
    errors = [row.relative_error for row in report.layers]
    return tokens.tolist(), served[0].tolist(), fqjax.perplexity(model, np.arange(3, 40), 8), errors


expected = results(plain)
graphdef, state = nnx.split(plain)
model = nnx.merge(graphdef, jax.tree.map(placed, state))
for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
    with context:
        found = results(model)
    assert found[:2] == expected[:2], (found, expected)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
    np.testing.assert_allclose(found[3], expected[3], rtol=1e-2)
print("as without a mesh")
"""


@pytest.mark.thorough
def test_a_mesh_with_explicit_axes_gives_what_no_mesh_gives():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.stdout.endswith("as without a mesh\n"), result.stderr[-3000:]
