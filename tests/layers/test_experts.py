"""Mixtures of experts: routing, statistics of each expert, experts that calibration did not reach, and how they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.drivers.candidates import Outline
from fqjax.drivers.statistics import calibrate
from fqjax.drivers.ties import choices, units_of
from fqjax.layers.experts import route, run_all, run_chosen
from fqjax.layers.stacked import StackedExperts, quantized_layers, stack, stacked, unstacked
from fqjax.layers.surgery import find_linears, select_linears
from fqjax.runtime.errors import InputError
from tests.models import variants

BATCHES = [np.random.default_rng(i).integers(3, 64, (4, 24)).astype(np.int32) for i in range(3)]
ROWS = 3 * 4 * 24


def mixtral(directory, name="mixtral", **changes):
    return load_hf(variants.write_checkpoint(directory, variants.VARIANTS[name] | changes), jnp.float32)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def shunned(tmp_path_factory):
    """A model whose last expert is never chosen: it has the logit 0 for every token, and of the first two one has more."""
    made = mixtral(tmp_path_factory.mktemp("shunned"), "mixtral-one")
    for layer in made.layers:
        gate = layer.mlp.gate.kernel
        gate[...] = gate[...].at[:, 3].set(0).at[:, 0].set(-gate[...][:, 1])
    return made


def linear_names(model):
    return list(select_linears(model).linears)


def inputs_of(model, layer):
    """What a layer's mixture reads, over all batches, and where its rows go."""

    @nnx.jit
    def read(model, batch):
        x, rest = model.begin(batch)
        for i in range(layer + 1):
            block = model.layers[i]
            attended, _, _ = block.self_attn(block.input_layernorm, x, None, None, None, *rest)
            rows = block.post_attention_layernorm(x + attended)
            x = x + attended + block.mlp(rows)
        return rows.reshape(-1, rows.shape[-1])

    rows, mlp = jnp.concatenate([read(model, batch) for batch in BATCHES]), model.layers[layer].mlp
    return rows, route(rows @ mlp.gate.kernel[...], mlp.k, normalized=mlp.normalized)


def test_weights_are_the_largest_probabilities_divided_by_their_sum_or_not():
    logits = jnp.asarray([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 4.0]])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    raw, normal = (route(logits, 2, normalized=normalized) for normalized in (False, True))
    np.testing.assert_array_equal(raw.chosen, [[1, 2], [3, 0]])
    np.testing.assert_allclose(raw.weights, [[p[0, 1], p[0, 2]], [p[1, 3], p[1, 0]]], rtol=1e-6)
    np.testing.assert_allclose(normal.weights, raw.weights / raw.weights.sum(1, keepdims=True), rtol=1e-6)
    assert raw.shares(4)[0].tolist() == [0, raw.weights[0, 0], raw.weights[0, 1], 0]


@pytest.mark.sample(1)
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_running_the_chosen_experts_gives_what_running_all_does(model, tokens):
    mlp = model.layers[0].mlp
    rows = jax.random.normal(jax.random.key(0), (tokens, 48))
    routing = route(rows @ mlp.gate.kernel[...], 2, normalized=True)
    chosen, everything = (f(mlp.experts, rows, routing) for f in (run_chosen, run_all))
    np.testing.assert_allclose(chosen, everything, rtol=1e-5, atol=1e-5)
    other = route(-rows @ mlp.gate.kernel[...], 2, normalized=True)
    assert np.abs(run_chosen(mlp.experts, rows, other) - everything).max() > 0.1


def test_no_tokens_need_no_expert(model):
    mlp, rows = model.layers[0].mlp, jnp.zeros((0, 48))
    assert run_chosen(mlp.experts, rows, route(rows @ mlp.gate.kernel[...], 2, normalized=True)).shape == (0, 48)


def test_the_router_is_left_in_float(model):
    skipped = select_linears(model).skipped
    assert {f"layers.{i}.mlp.gate" for i in range(2)} <= set(skipped)


def test_statistics_are_those_of_the_rows_that_are_sent_to_an_expert(model):
    seen = calibrate(model, BATCHES, linear_names(model), sample_rows=16)
    rows, routing = inputs_of(model, 1)
    total = 0
    for e, expert in enumerate(model.layers[1].mlp.experts):
        own = rows[(routing.chosen == e).any(axis=1)]
        total += len(own)
        assert 16 < len(own) < ROWS
        inner = nnx.silu(own @ expert.gate_up_proj.kernel[...][:, :80]) * (
            own @ expert.gate_up_proj.kernel[...][:, 80:]
        )
        for name, wanted in (("gate_up_proj", own), ("down_proj", inner)):
            found = seen[f"layers.1.mlp.experts.{e}.{name}"]
            assert (found.rows, found.passed, found.samples.shape) == (len(own), ROWS, (16, wanted.shape[1]))
            np.testing.assert_allclose(found.absmax, np.abs(wanted).max(axis=0), rtol=1e-4, atol=1e-4)
            distances = np.abs(found.samples[:, None] - np.asarray(wanted)[None]).max(axis=2).min(axis=1)
            assert distances.max() < 1e-4
    assert total == 2 * ROWS


def test_an_expert_that_was_never_reached_has_the_statistics_of_all_rows(shunned):
    seen = calibrate(shunned, BATCHES, linear_names(shunned), sample_rows=16)
    rows, routing = inputs_of(shunned, 0)
    assert not (routing.chosen == 3).any()
    kernel = shunned.layers[0].mlp.experts[3].gate_up_proj.kernel[...]
    inner = nnx.silu(rows @ kernel[:, :80]) * (rows @ kernel[:, 80:])
    for name, wanted in (("gate_up_proj", rows), ("down_proj", inner)):
        found = seen[f"layers.0.mlp.experts.3.{name}"]
        assert (found.rows, found.passed, len(found.samples)) == (0, ROWS, 16)
        np.testing.assert_allclose(found.absmax, np.abs(wanted).max(axis=0), rtol=1e-4, atol=1e-4)


def test_few_rows_are_filled_up_with_those_of_other_experts(model):
    """With as many samples as there are rows, an expert's own and all others are kept, its own first."""
    name = "layers.0.mlp.experts.0.gate_up_proj"
    found = calibrate(model, BATCHES, [name], sample_rows=ROWS)[name]
    rows, routing = inputs_of(model, 0)
    own = np.asarray((routing.chosen == 0).any(axis=1))
    assert found.rows == own.sum() and len(found.samples) == ROWS
    np.testing.assert_allclose(found.absmax, np.abs(rows).max(axis=0), rtol=1e-5, atol=1e-5)
    first = np.abs(found.samples[: own.sum(), None] - np.asarray(rows)[own][None]).max(axis=2).min(axis=1)
    assert first.max() < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["w8a8", "smoothquant", "w4a8-integer-scale-gptq", "w4a8-awq"])
def test_an_expert_that_was_never_reached_computes_about_what_it_did(shunned, scheme):
    quantized, report = fqjax.quantize(shunned, scheme, BATCHES)
    assert {row.macs for row in report.layers if ".experts.3." in row.name} == {0}
    rows, _ = inputs_of(shunned, 0)
    plain, low = shunned.layers[0].mlp.experts[3], unstacked(quantized).layers[0].mlp.experts[3]
    error = np.mean((low(rows) - plain(rows)) ** 2) / np.mean(np.asarray(plain(rows)) ** 2)
    assert 0 < error < 0.05


@pytest.mark.thorough
@pytest.mark.parametrize(
    "scheme", ["w8a8", "flattenquant", "w4a8-integer-scale-gptq", "w4a8-integer-scale-folded", "w4a16"]
)
def test_every_scheme_stacks_its_experts_and_survives_saving(model, scheme, tmp_path):
    quantized, report = fqjax.quantize(model, scheme, BATCHES)
    tokens, call = variants.tokens(), nnx.jit(lambda model, tokens: model(tokens))
    for layer in quantized.layers:
        assert isinstance(layer.mlp.experts, StackedExperts) and layer.mlp.experts.gate_up_proj.shared
    found, plain = call(quantized, tokens), call(model, tokens)
    np.testing.assert_array_equal(call(unstacked(quantized), tokens), found)
    assert 0 < np.mean((found - plain) ** 2) / np.mean(np.square(plain)) < 0.5
    assert report.int4_mac_share >= fqjax.PRESETS[scheme].method.allocation.int4_share
    assert sum(row.macs for row in report.layers if ".experts." in row.name) == 2 * 2 * 3 * 48 * 80
    fqjax.save(tmp_path / "out", quantized)
    loaded = fqjax.load(tmp_path / "out")
    np.testing.assert_array_equal(call(loaded, tokens), found)
    assert isinstance(loaded.layers[0].mlp.experts, StackedExperts)
    assert quantized_layers(loaded).keys() == set(linear_names(model))


def test_tokens_are_quantized_once_for_all_experts(model, monkeypatch):
    quantized, _ = fqjax.quantize(model, "smoothquant", BATCHES)
    seen = []
    kind = type(quantized.layers[0].mlp.experts.gate_up_proj.input.get_value())
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, x: seen.append(x.shape) or call(self, x))
    quantized.layers[0].mlp(jnp.ones((2, 5, 48)))
    assert seen == [(10, 48)]


def test_experts_of_one_layer_have_the_same_bits_and_the_share_is_kept(model):
    scheme = fqjax.PRESETS["flattenquant"].override(["compression=0", "int4_share=0.5"])
    _, report = fqjax.quantize(model, scheme, BATCHES)
    bits = {}
    for row in report.layers:
        bits.setdefault(row.name.replace(".experts.", " ").split(" ")[0] + row.name.split(".")[-1], set()).add(row.bits)
    assert all(len(some) == 1 for some in bits.values()) and 0.5 <= report.int4_mac_share < 1
    assert {row.bits for row in report.layers} == {4, 8}


@pytest.mark.thorough
def test_some_experts_in_float_run_beside_the_others(model, tmp_path):
    quantized, report = fqjax.quantize(model, "w4a8-integer-scale", BATCHES, ignore=[r"layers\.0\.mlp\.experts\.2\."])
    assert isinstance(quantized.layers[0].mlp.experts, nnx.List)
    assert isinstance(quantized.layers[1].mlp.experts, StackedExperts)
    assert {row.bits for row in report.layers if row.name.startswith("layers.0.mlp.experts.1")} == {4}
    fqjax.save(tmp_path / "out", quantized)
    np.testing.assert_array_equal(variants.logits(fqjax.load(tmp_path / "out")), variants.logits(quantized))


def test_stacking_leaves_the_model_as_it_was(model):
    quantized, _ = fqjax.quantize(model, "w8a8", BATCHES)
    single = unstacked(quantized)
    for shown in (str(quantized), str(single)):  # The scheme by its name, without its settings.
        assert "scheme='" in shown and '"method"' not in shown and "recipe" not in shown
    assert isinstance(quantized.layers[0].mlp.experts, StackedExperts)
    assert isinstance(stacked(single).layers[0].mlp.experts, StackedExperts)
    assert isinstance(single.layers[0].mlp.experts, nnx.List)
    assert stacked(model) is model and unstacked(model) is model


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mixtral-window", "qwen3-moe-mlp-only"])
def test_quantized_experts_generate_what_the_whole_text_predicts(name, tmp_path):
    quantized, _ = fqjax.quantize(mixtral(tmp_path, name), "w4a8-integer-scale", BATCHES)
    prompts = [[5, 9, 11], [7]]
    new = fqjax.generate(quantized, prompts, 6, eos_token_id=[])
    for prompt, continuation in zip(prompts, new, strict=True):
        text = np.asarray([prompt + list(map(int, continuation))], np.int32)
        logits = np.asarray(variants.logits(quantized, text))[0]
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(axis=1), continuation)


@pytest.mark.thorough
def test_integer_scales_of_a_quantized_model(model):
    quantized, _ = fqjax.quantize(model, "w4a8", BATCHES)
    changed, report = fqjax.integer_scales(quantized)
    assert {row.scales for row in report.layers} == {"group of 128, integer"}
    assert isinstance(changed.layers[0].mlp.experts, StackedExperts)
    assert 0 < np.abs(variants.logits(changed) - variants.logits(quantized)).max() < 0.5


def test_units_and_their_choices(model):
    linears = select_linears(model).linears
    units = units_of(linears)
    assert len(units) == 2 * 4 and len(units["layers.0.mlp.experts.*.down_proj"]) == 4
    assert units["layers.1.self_attn.qkv_proj"] == ("layers.1.self_attn.qkv_proj",)
    odd = {"experts.0.up": nnx.Linear(4, 5, rngs=nnx.Rngs(0)), "experts.1.up": nnx.Linear(4, 6, rngs=nnx.Rngs(0))}
    assert units_of(odd) == {name: (name,) for name in odd}

    def outline(bits, width, error):
        return Outline(bits=bits, error=error, divergence=0.0, width=width, bytes=width)

    a = [outline(8, 128, 0.1), outline(4, 256, 0.4), outline(4, 512, 0.3)]
    b = [outline(8, 128, 0.2), outline(4, 512, 0.6)]
    found = choices({"a": a, "b": b}, {"a": 3, "b": 1})
    assert [(c.outline.bits, c.outline.width, c.options) for c in found] == [
        (8, 128, {"a": 0, "b": 0}),
        (4, 512, {"a": 2, "b": 1}),
    ]
    assert found[1].outline.error == pytest.approx(0.75 * 0.3 + 0.25 * 0.6) and found[1].outline.bytes == 1024
    assert [c.outline for c in choices({"a": a}, {"a": 0})] == a


def restack(directory, config):
    """Rewrites a checkpoint with all experts of a layer in one tensor, as transformers holds them."""
    tensors = load_file(directory / "model.safetensors")
    mixtral = config["model_type"] == "mixtral"
    old, names = ("block_sparse_moe", ("w1", "w3", "w2")) if mixtral else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        count = config["num_local_experts" if mixtral else "num_experts"]
        gate, up, down = (
            np.stack([tensors.pop(f"{prefix}{old}.experts.{e}.{name}.weight") for e in range(count)]) for name in names
        )
        tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}{old}.gate.weight")
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{prefix}mlp.experts.down_proj"] = down
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_in_one_tensor_are_read_too(name, tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS[name])
    single, _ = load_hf(directory, jnp.float32)
    restack(directory, variants.VARIANTS[name])
    together, _ = load_hf(directory, jnp.float32)
    for path, linear in find_linears(single).items():
        np.testing.assert_array_equal(find_linears(together)[path].kernel[...], linear.kernel[...])
    tensors = load_file(directory / "model.safetensors")
    key = "model.layers.1.mlp.experts.down_proj"
    tensors[key] = np.ascontiguousarray(tensors[key][:-1])
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=rf"{key}.*has shape .*config.json implies"):
        load_hf(directory, jnp.float32)


def test_a_missing_expert_is_named(tmp_path):
    directory = variants.write_checkpoint(tmp_path, variants.VARIANTS["mixtral"])
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight' is missing"):
        load_hf(directory, jnp.float32)


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", ["smoothquant", "w4a8-integer-scale"])
def test_a_wider_layer_computes_the_same(scheme):
    linear = nnx.Linear(80, 48, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (30, 80))
    layer = fqjax.quantize(nnx.Sequential(linear), scheme, [x])[0].layers[0]
    wider = layer.widened(layer.sizes.width + 256)
    assert wider.weight.get_value().shape[1] == wider.input.get_value().width == layer.input.get_value().width + 256
    np.testing.assert_array_equal(wider(x), layer(x))
    assert stack([layer, wider]) is None and stack([wider, wider]) is not None


@pytest.mark.thorough
def test_gptq_rounds_an_expert_for_the_tokens_that_are_sent_to_it(model, monkeypatch):
    """The error on these, by the weight of the expert's output: less than if all tokens counted alike, or none did."""
    rows, routing = inputs_of(model, 0)
    shares = routing.shares(4)

    def errors(scheme):
        jax.clear_caches()  # The weight of the other tokens is a constant of compiled programs.
        quantized = unstacked(fqjax.quantize(model, scheme, BATCHES)[0]).layers[0].mlp.experts
        found = []
        for low, plain, share in zip(quantized, model.layers[0].mlp.experts, shares.T, strict=True):
            given, wanted = (expert.gate_up_proj(rows) * share[:, None] for expert in (low, plain))
            found.append(float(np.sum((given - wanted) ** 2) / np.sum(np.square(wanted))))
        return np.array(found)

    own, nearest = errors("w4a16-gptq"), errors("w4a16")
    monkeypatch.setattr("fqjax.drivers.passed_rows.UNROUTED_ROW_WEIGHT", 1.0)
    alike = errors("w4a16-gptq")
    monkeypatch.undo()
    jax.clear_caches()
    assert (own < 0.95 * alike).all() and (alike < nearest).all()


@pytest.mark.parametrize("alignment", [1, 8])
def test_rows_of_experts_begin_at_multiples_of_the_alignment(alignment):
    rng = np.random.default_rng(5)
    routing = route(jnp.asarray(rng.normal(size=(13, 6)) + np.arange(6) * 2.0), 2, normalized=True)
    pairs = routing.sorted(6, alignment)
    assert (np.asarray(pairs.sizes) % alignment == 0).all() and len(pairs.token) % alignment == 0
    assert pairs.sizes.sum() <= len(pairs.token)
    owner = np.repeat(np.arange(6), pairs.sizes)
    place = np.asarray(pairs.place).reshape(routing.chosen.shape)
    assert len(np.unique(place)) == place.size
    np.testing.assert_array_equal(owner[place], routing.chosen)
    np.testing.assert_array_equal(np.asarray(pairs.token)[place], np.tile(np.arange(13)[:, None], 2))
    np.testing.assert_array_equal(np.asarray(pairs.expert)[place], routing.chosen)


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["w4a8-integer-scale", "flattenquant-w8a8"])
def test_alignment_changes_no_bit(monkeypatch, model, scheme):
    quantized, _ = fqjax.quantize(model, scheme, BATCHES[:1])
    wanted = variants.logits(quantized, BATCHES[1])
    monkeypatch.setattr("fqjax.layers.stacked.row_alignment", lambda: 8)
    np.testing.assert_array_equal(variants.logits(quantized, BATCHES[1]), wanted)
