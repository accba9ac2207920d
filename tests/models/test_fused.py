"""Layers together with what stands in front of them: the same as one after the other, whichever of them are quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.bench.random_models import architecture, random_model
from fqjax.layers import linear
from fqjax.models.fused import after_activation, after_norm, gated
from fqjax.presets import resolve_scheme


@pytest.fixture(scope="module", params=["flattenquant-hopper-int4", "flattenquant-w8a8", "w4a8-integer-scale"])
def layer(request):
    """Of a small Llama: integer weights, with extra channels or with a scale for every token."""
    name, config = architecture("llama-3-8b")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    small = dataclasses.replace(config, **sizes, **heads)
    return random_model(name, small, resolve_scheme(request.param), extra=0.05).layers[0]


@pytest.mark.sample(1)
@pytest.mark.parametrize("floats", [(), ("gate_up",), ("down",), ("gate_up", "down")])
@pytest.mark.parametrize("pending", [False, True])
def test_gate_and_up_go_through_one_call_where_both_layers_are_quantized(monkeypatch, layer, floats, pending):
    calls, real = [], linear.gated_matmul
    monkeypatch.setattr(linear, "gated_matmul", lambda *a, **k: calls.append(k["activation"]) or real(*a, **k))
    layers = {"gate_up": layer.mlp.gate_up_proj, "down": layer.mlp.down_proj}
    for name, sizes in (("gate_up", (256, 1024)), ("down", (512, 256))):
        if name in floats:
            layers[name] = nnx.Linear(*sizes, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x, residual = (jax.random.normal(jax.random.key(i), (2, 3, 256), jnp.bfloat16) for i in range(2))
    given = layer.post_attention_layernorm, x, residual if pending else None
    found, stream = gated(*layers.values(), *given, "silu")
    y, wanted_stream = after_norm(layers["gate_up"], *given)
    wanted = after_activation(layers["down"], y, "silu", gated=True)
    assert calls == ([] if floats else ["silu"]) and found.dtype == wanted.dtype
    np.testing.assert_array_equal(stream, wanted_stream)
    np.testing.assert_array_equal(found, wanted)
    assert np.abs(np.asarray(found, np.float32)).max() > 0.01
