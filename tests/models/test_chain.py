import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.core.channels import gather_codes
from fqjax.core.codes import qmax
from fqjax.drivers import moments as compensate
from fqjax.drivers import rounding
from fqjax.drivers import trial as sensitivity
from fqjax.layers.simulated import Simulated
from fqjax.layers.stacked import quantized_layers
from fqjax.models import chain as blocks
from fqjax.models.chain import chain, run
from fqjax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=64,
    bos_token_id=1,
)


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    return [jnp.asarray(np.random.default_rng(i).integers(0, 96, (2, 32)), jnp.int32) for i in range(3)]


def outlying(model):
    """The model with a few large channels in front of every linear layer."""
    changed = nnx.clone(model)
    for layer in changed.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.scale[...] = norm.scale[...].at[:5].multiply(40)
    return changed


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["flattenquant-w4a4", "flattenquant-w8a8", "flattenquant-hopper-int4"])
def test_a_simulated_layer_computes_what_the_layer_computes(model, batches, scheme, monkeypatch):
    simulated, original = {}, rounding.assemble

    def assemble(name, linear, plan, codes, *args, **kwargs):
        simulated[name] = Simulated.of(linear, plan, codes)
        return original(name, linear, plan, codes, *args, **kwargs)

    monkeypatch.setattr(rounding, "assemble", assemble)
    quantized, report = fqjax.quantize(outlying(model), scheme, batches)
    layers = quantized_layers(quantized)
    assert report.expansion > 1 and simulated.keys() == layers.keys()
    for name, layer in layers.items():
        x = jnp.asarray(np.random.default_rng(0).normal(size=(20, layer.sizes.inputs)) * 9, jnp.bfloat16)
        exact, found = (np.asarray(f(x), np.float32) for f in (layer, simulated[name]))
        np.testing.assert_allclose(found, exact, rtol=1e-2, atol=1e-3 * np.abs(exact).max())


def test_gathering_takes_flattening_back(model, batches):
    quantized, _ = fqjax.quantize(outlying(model), "flattenquant-w8a8", batches)
    flattened = 0
    for layer in quantized_layers(quantized).values():
        quantizer, weight = layer.input.get_value(), np.asarray(layer.weight.get_value().unpacked(), np.int64)
        gathered, pieces = gather_codes(layer.weight.get_value().unpacked(), quantizer.source, quantizer.part)
        codes, limit = np.asarray(gathered, np.int64), qmax(quantizer.bits) * np.asarray(pieces, np.int64)
        used = quantizer.flattened()
        assert used == layer.figures.flattened
        flattened += used
        # What the integer matmul makes of one channel at its limit is that limit times the channel's whole weight.
        k = len(limit)
        for channel in np.unique(np.r_[0, np.asarray(quantizer.source)[:used]]):
            x = np.zeros(k)
            x[channel] = limit[channel] / np.asarray(quantizer.multiplier)[channel]
            given, _ = quantizer(jnp.asarray(x[None], jnp.float32))
            assert int(np.abs(np.asarray(given, np.int64)).sum()) >= limit[channel]
            np.testing.assert_array_equal(weight @ np.asarray(given[0], np.int64), limit[channel] * codes[:, channel])
    assert flattened


def test_the_chain_computes_what_the_model_computes(model, batches):
    parts = chain(model, ["layers.0.mlp.down_proj", "layers.3.self_attn.o_proj"])
    assert list(parts.blocks) == [f"layers.{i}" for i in range(4)]
    x, others = parts.begin(batches[0])
    for block in parts.blocks.values():
        x = run(parts, nnx.split(block), x, others)
    assert_close(parts.end(x), model(batches[0]))


def test_a_layer_outside_the_blocks_makes_the_model_one_block(model, batches):
    parts = chain(model, ["layers.0.mlp.down_proj", "adapter"])
    assert list(parts.blocks) == [""]
    x, others = parts.begin(batches[0])
    assert_close(parts.end(run(parts, nnx.split(parts.blocks[""]), x, others)), model(batches[0]))


def assert_close(logits, wanted):
    """But for bfloat16, which differs by what the compiler fuses."""
    assert float(jnp.abs(logits - wanted).mean()) < 0.02 * float(jnp.abs(wanted).mean())


@pytest.mark.thorough
def test_one_compiled_program_serves_all_blocks(model, batches):
    programs = (blocks._run, sensitivity._run_probed, compensate._inputs)
    for program in programs:
        program.clear_cache()
    quantized, report = fqjax.quantize(outlying(model), "flattenquant", batches)
    assert 0 < report.int4_layer_share < 1
    assert len({layer.input.get_value().width for layer in quantized_layers(quantized).values()}) > 1
    # The float block and the quantized one; with a probe in it; with taps.
    assert [program._cache_size() for program in programs] == [2, 1, 1]
