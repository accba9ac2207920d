"""Models of which hardly anything is computed."""

import jax.numpy as jnp
import pytest
from flax import nnx

from fqjax.models.llama import Llama, LlamaConfig
from tests.arguments.values import HEADS, SIZES


@pytest.fixture(scope="module")
def llama():
    return Llama(LlamaConfig(**SIZES, **HEADS, bos_token_id=1), dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def mlp():
    return nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
