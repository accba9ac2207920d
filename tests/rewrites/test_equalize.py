"""Equalization changes weights, not the function."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.checkpoint.hugging_face import load_hf
from fqjax.rewrites.equalize import equalize
from tests.models import variants

LINEAR = [name for name in variants.VARIANTS if name != "opt-gelu"]


def mlps(layer):
    return layer.mlp.experts if hasattr(layer.mlp, "experts") else [layer.mlp]


def with_large_rows(model):
    """The same function with large rows where they can be undone."""
    for i, layer in enumerate(model.layers):
        f = np.ones(80, np.float32)
        f[i] = 64
        if hasattr(layer, "mlp"):
            for mlp in mlps(layer):
                up, f = mlp.gate_up_proj, np.ones(mlp.down_proj.in_features, np.float32)
                f[i] = 64
                up.kernel[...] = up.kernel[...] * np.concatenate([np.ones_like(f), f])
                if up.bias is not None:
                    up.bias[...] = up.bias[...] * np.concatenate([np.ones_like(f), f])
                mlp.down_proj.kernel[...] = mlp.down_proj.kernel[...] / f[:, None]
        else:
            layer.fc1.kernel[...] = layer.fc1.kernel[...] * f
            if layer.fc1.bias is not None:
                layer.fc1.bias[...] = layer.fc1.bias[...] * f
            layer.fc2.kernel[...] = layer.fc2.kernel[...] / f[:, None]
    return model


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LINEAR)
def test_the_function_stays_and_large_rows_go(name, tmp_path):
    model = with_large_rows(load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), jnp.float32)[0])
    before = nnx.clone(model)
    equal = equalize(model)
    wanted = variants.logits(before)
    np.testing.assert_allclose(variants.logits(equal), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(variants.logits(model), wanted)
    first = equal.layers[0]
    for up in [mlp.gate_up_proj for mlp in mlps(first)] if hasattr(first, "mlp") else [first.fc1]:
        largest = np.abs(up.kernel[...]).max(axis=0)
        assert largest.max() / np.median(largest) < 3
    values = np.abs(np.asarray(equal.layers[1].self_attn.qkv_proj.kernel[...])).max(axis=0)[-8:]
    assert values.max() / np.median(values) < 3


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["mistral-window", "qwen2", "qwen3-window"])
def test_large_values_go_with_their_biases(name, tmp_path):
    """Value channels that are large, bias included, and undone in the next layer; queries and keys are left alone."""
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS[name]), jnp.float32)
    before, plain = variants.logits(model), nnx.clone(model)
    head_dim = model.config.head_dim
    for layer in model.layers:
        qkv, out = layer.self_attn.qkv_proj, layer.self_attn.o_proj
        # The first channel of the last value head, which the last two of the four query heads share.
        qkv.kernel[...] = qkv.kernel[...].at[:, -head_dim].multiply(64)
        if qkv.bias is not None:
            qkv.bias[...] = qkv.bias[...].at[-head_dim].multiply(64)
        out.kernel[...] = out.kernel[...].at[jnp.array([2, 3]) * head_dim].divide(64)
    np.testing.assert_allclose(variants.logits(model), before, rtol=1e-5, atol=1e-5)
    equal = equalize(model)
    np.testing.assert_allclose(variants.logits(equal), before, rtol=1e-5, atol=1e-5)
    for layer, original in zip(equal.layers, plain.layers, strict=True):
        new, old = layer.self_attn.qkv_proj, original.self_attn.qkv_proj
        values = 2 * head_dim
        np.testing.assert_array_equal(new.kernel[:, :-values], old.kernel[:, :-values])
        assert 0.4 < np.abs(new.kernel[:, -head_dim]).max() / np.abs(old.kernel[:, -head_dim]).max() < 2.1
        if new.bias is not None:
            np.testing.assert_array_equal(new.bias[:-values], old.bias[:-values])
            assert 0.4 < new.bias[-head_dim] / old.bias[-head_dim] < 2.1


def test_nothing_is_done_through_an_activation_that_is_not_linear(tmp_path):
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["opt-gelu"]), jnp.float32)
    np.testing.assert_array_equal(equalize(model).layers[0].fc1.kernel[...], model.layers[0].fc1.kernel[...])


def test_a_model_that_names_no_paths_is_returned():
    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    assert equalize(model) is model
