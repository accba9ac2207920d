"""Models with random weights in every format, and their times."""

import json

import jax
import jax.numpy as jnp
import pytest

import fqjax
from fqjax.bench import model as bench
from fqjax.bench import model_record, model_times
from fqjax.bench.model_cases import SCHEMES, Case, parse_variant
from fqjax.bench.random_models import CONFIGS, architecture, described, random_model
from fqjax.cli.main import main
from fqjax.core.formats.uniform import Uniform
from fqjax.core.stored_inputs import FloatingInput, PerTokenInput, StaticInput
from fqjax.layers.stacked import StackedExperts, quantized_layers
from fqjax.runtime.errors import InputError
from tests.models import variants

TINY = architecture("tiny")
OPT = CONFIGS["opt-30b"] | {
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 128,
    "vocab_size": 512,
}
MIXTRAL = CONFIGS["mixtral-8x7b"] | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 512,
}


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    """How long something takes is not what is tested."""
    monkeypatch.setattr(model_times, "TIMED_CALLS", 2)


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("hf", [CONFIGS["tiny"], OPT, MIXTRAL], ids=["llama", "opt", "mixtral"])
def test_random_models_have_the_formats_of_their_scheme(hf, scheme):
    scheme = fqjax.PRESETS[scheme]
    model = random_model(*described(hf), scheme, extra=0.1)
    layers = quantized_layers(model)
    assert bool(layers) == (scheme.method is not None)
    macs = sum(layer.figures.macs for layer in layers.values())
    share = sum(layer.figures.macs for layer in layers.values() if layer.bits == 4) / max(macs, 1)
    least = scheme.method.allocation.int4_share if layers else 0.0
    assert least <= share <= min(1.0, least + 0.2) or not layers
    grouped = scheme.name.startswith("w4a")
    for layer in layers.values():
        weight, quantizer = layer.weight.get_value(), layer.input.get_value()
        if grouped:
            kinds = {"folded": "folded", "scale": "integer"}
            scales = kinds.get(scheme.name.split("-")[-1], "float")
            assert (weight.format.group_size, weight.format.scales) == (128, scales)
            assert type(quantizer) is (FloatingInput if scheme.name.startswith("w4a16") else PerTokenInput)
        else:
            assert isinstance(weight.format, Uniform) and isinstance(quantizer, StaticInput)
        flattened = 0 if grouped else round(0.1 * quantizer.inputs)
        assert quantizer.flattened() == layer.figures.flattened == flattened
    logits = model(jnp.arange(12).reshape(1, 12))
    assert bool(jnp.isfinite(logits).all()) and 0.01 < float(jnp.std(logits)) < 100
    if hf is MIXTRAL and layers:
        assert all(isinstance(layer.mlp.experts, StackedExperts) for layer in model.layers)
        assert macs == 2 * (128 * 256 + 128 * 128 + 2 * 3 * 128 * 256)


@pytest.mark.thorough
def test_activations_use_the_codes(monkeypatch):
    model = random_model(*TINY, fqjax.PRESETS["flattenquant-w8a8"])
    seen = []
    for name in ("multiply", "gate"):  # The second of gate and up projections.
        real = getattr(fqjax.QuantizedLinear, name)
        noted = lambda s, x, *a, real=real: (seen.append(x), real(s, x, *a))[1]  # noqa: E731
        monkeypatch.setattr(fqjax.QuantizedLinear, name, noted)
    model(jax.random.randint(jax.random.key(0), (1, 32), 0, 1024))
    spreads = [float(jnp.std(x.codes.astype(jnp.float32))) for x in seen]
    assert len(spreads) == 8 and all(2 < spread < 90 for spread in spreads), spreads


@pytest.mark.thorough
def test_rows_and_ratios():
    cases, kept = (Case("prefill", 2, 16), Case("decode", 2, 16)), []
    result = bench.run("tiny", TINY, ("w4a8", "bf16"), cases, keep=lambda result: kept.append(len(result["rows"])))
    assert kept == [2, 4]
    rows = {(row["scheme"], row["phase"]): row for row in result["rows"]}
    assert list(rows) == [(s, p) for s in ("bf16", "w4a8") for p in ("prefill", "decode")]
    for (_, phase), row in rows.items():
        assert row["tokens_per_second"] == pytest.approx(
            1e3 * 2 * (16 if phase == "prefill" else 1) / row["milliseconds"]
        )
        assert row["ratio_to_bf16"] == rows["bf16", phase]["milliseconds"] / row["milliseconds"]
    assert rows["w4a8", "decode"]["device_bytes"] < rows["bf16", "decode"]["device_bytes"]
    page = model_record.markdown({"tiny on a device": result})
    assert "## tiny on a device" in page and "| `w4a8` |" in page and "decode 2 x 16" in page


def test_floors_are_those_of_bytes_and_products():
    config = TINY[1]
    macs, model = bench.linear_macs(*TINY), random_model(*TINY, fqjax.PRESETS["w4a8"])
    assert macs == 2 * (256 * (256 + 2 * 64) + 256 * 256 + 3 * 256 * 768)
    ceilings = {"bf16_tflops": 0.5, "int8_tops": 1.0, "copy_tb_per_s": 2.0}
    plain, cached = parse_variant("w4a8"), parse_variant("w4a8+int8-cache")
    prefill, step = Case("prefill", 3, 16), Case("decode", 3, 16)
    bf16 = 2 * (2 * 256 * 3 * 16**2 + 3 * 2048 * 256) / 0.5e12
    assert bench.floor(model, prefill, plain, 0, macs, ceilings) == pytest.approx(1e3 * (bf16 + 2 * macs * 48 / 1e12))
    used, table = 10_000_000, 2 * 2048 * 256
    for variant, entry in ((plain, 64 * 2), (cached, 64 + 2 * 4)):
        cache = 2 * config.num_hidden_layers * 48 * entry
        found = bench.floor(model, step, variant, used, macs, ceilings)
        assert found == pytest.approx(1e3 * (used - table + cache) / 2e12)
    assert bench.floor(model, step, plain, used, macs, {"bf16_tflops": 0.0}) is None
    assert bench.linear_macs(*described(MIXTRAL)) == 2 * (128 * 256 + 128 * 128 + 2 * 3 * 128 * 256)


@pytest.mark.parametrize(
    ("text", "head", "cache"),
    [("w4a8", False, None), ("w4a8+int8-head", True, None), ("w4a8+int8-cache", False, "int8")],
)
def test_names_of_variants(text, head, cache):
    variant = parse_variant(text)
    assert (variant.scheme.head == "int8", variant.kv_cache, variant.name) == (head, cache, text)
    both = parse_variant("w4a8+int8-cache+int8-head")
    assert both.name == "w4a8+int8-head+int8-cache"
    with pytest.raises(InputError, match=r"scheme w4a8\+fp8: 'fp8' follows; expected \+int8-head or \+int8-cache"):
        parse_variant("w4a8+fp8")


def test_rows_that_are_not_measured_again_are_kept_and_all_stay_in_their_order():
    def result(date, device="d", **rows):
        made = [{"scheme": s, "phase": "decode", "batch": 1, "length": 8, "milliseconds": ms} for s, ms in rows.items()]
        return {"date": date, "device": device, "versions": {}, "extra_channels": 0.05, "rows": made, "skipped": []}

    before = model_record.combined(
        None, result("monday", bf16=2.0, w4a8=1.0, w8a8=1.5) | {"skipped": [{"scheme": "w4a16"}]}
    )
    both = model_record.combined(before, result("tuesday", w4a8=0.5, w4a16=0.7))
    assert [(r["scheme"], r["date"], r["milliseconds"]) for r in both["rows"]] == [
        ("bf16", "monday", 2.0),
        ("w4a8", "tuesday", 0.5),
        ("w8a8", "monday", 1.5),
        ("w4a16", "tuesday", 0.7),
    ]
    assert both["skipped"] == []
    other = model_record.combined(before, result("tuesday", device="e", w4a8=0.5))
    assert [row["scheme"] for row in other["rows"]] == ["w4a8"]


def test_what_does_not_fit_is_left_out(monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    monkeypatch.setattr(bench, "random_model", full)
    result = bench.run("tiny", TINY, ("bf16",))
    assert result["rows"] == [] and result["skipped"][0]["why"] == "RESOURCE_EXHAUSTED: Out of memory"
    assert "bf16 left out" in bench.summary(result)


def test_a_profile_adds_up_what_is_of_one_kind():
    times = [("matmul", 5.0), ("loop_fusion_1", 1.0), ("loop_fusion_22", 2.0)] * 4
    assert model_times.profile(times, 4) == [
        {"kernel": "matmul", "calls": 1, "microseconds": 5},
        {"kernel": "loop_fusion", "calls": 2, "microseconds": 3},
    ]
    row = {"model": "m", "scheme": "w4a8", "phase": "decode", "batch": 1, "length": 8, "milliseconds": 0.01}
    row |= {
        "device_bytes": 1,
        "ratio_to_bf16": None,
        "device_milliseconds": 0.008,
        "kernels": model_times.profile(times, 4),
    }
    row["floor_milliseconds"] = 0.004
    ceilings = {"bf16_tflops": 800.0, "int8_tops": 1600.0, "copy_tb_per_s": 3.0}
    result = {"rows": [row], "device": "d", "versions": {}, "date": "today", "ceilings": ceilings}
    result["rows"] += [row | {"batch": 64}, row | {"scheme": "w4a16"}]  # Both schemes have the first case.
    page = model_record.profiles({"m on d": result})
    assert page.count("###") == 2 and "### `w4a16`: decode 1 x 8" in page
    assert "## m on d" in page
    assert "0.01 ms by the clock on the wall, 0.01 ms in kernels, 0.00 ms the floor." in page
    assert "### `w4a8`: decode 1 x 8" in page and "| loop_fusion | 2 | 3 | 37.5% |" in page


def test_decoding_measured_by_whole_calls_is_marked():
    row = {"scheme": "w4a8", "phase": "decode", "milliseconds": 2.0, "ratio_to_bf16": 2.0}
    assert model_record._cell(row) == "2.00† (2.00 x)"
    assert model_record._cell(row | {"call_milliseconds": 3.0}) == "2.00 (2.00 x)"


def test_no_scheme_is_begun_late():
    result = bench.run("tiny", TINY, ("bf16", "w4a8"), (Case("prefill", 1, 8),), seconds=0)
    assert not result["rows"] and [row["why"] for row in result["skipped"]] == ["out of time"] * 2


def test_decoding_begins_behind_a_full_cache(monkeypatch):
    model, seen = random_model(*TINY, fqjax.PRESETS["bf16"]), []
    extend = type(model).extend

    def noted(self, tokens, cache, counts):
        jax.debug.callback(lambda lengths: seen.append(lengths.tolist()), cache.lengths)
        return extend(self, tokens, cache, counts)

    monkeypatch.setattr(type(model), "extend", noted)
    model_times.decode.clear_cache()
    model_times.measure(model, Case("decode", 2, 16))
    assert len(seen) == (model_times.DECODED_TOKENS + model_times.SHORT_CALL_TOKENS) * (model_times.TIMED_CALLS + 1)
    assert sorted(set(map(tuple, seen))) == [(16 + i, 16 + i) for i in range(model_times.DECODED_TOKENS)]


def test_the_command(tmp_path):
    arguments = ["bench", "model", "--scheme", "bf16", "--prefill", "1x8", "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    wanted = {"model", "scheme", "phase", "batch", "length", "milliseconds", "tokens_per_second", "device_bytes"}
    assert wanted | {"ratio_to_bf16", "compile_seconds", "floor_milliseconds", "spread"} == set(row)
    assert row["spread"]["min"] == row["milliseconds"] <= row["spread"]["median"] <= row["spread"]["max"]
    assert (row["model"], row["batch"], row["length"], row["ratio_to_bf16"]) == ("tiny", 1, 8, 1.0)


@pytest.mark.thorough
def test_the_command_writes_behind_every_scheme(tmp_path, monkeypatch):
    """What was measured before it is interrupted is not lost."""
    measure, out = bench.measure, tmp_path / "out.json"

    def interrupted(model, case, kv_cache):
        if out.exists():
            raise KeyboardInterrupt
        return measure(model, case, kv_cache)

    monkeypatch.setattr(bench, "measure", interrupted)
    arguments = ["bench", "model", "--scheme", "bf16", "--scheme", "w4a8", "--decode", "2x8", "--json", str(out)]
    assert main(arguments) != 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["scheme"] == "bf16" and "call_milliseconds" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models"], "No such command 'models'"),
        (["model", "--shape", "64x256"], "No such option: --shape"),
        (["kernels", "--scheme", "bf16"], "No such option: --scheme"),
        (["model", "--model", "gpt-9"], "--model gpt-9: expected a config.json, or one of llama-3-8b"),
        (["model", "--prefill", "8"], "--prefill 8: expected sequences x tokens"),
        (["model", "--decode", "0x8"], "--decode 0x8: expected sequences x tokens"),
        (["model", "--scheme", "w2a2"], "unknown scheme 'w2a2'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_configurations_that_are_none(tmp_path):
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "config.json"),
        ("{}", "architecture not named"),
        ("[]", "expected a JSON|no JSON|not a"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            architecture(str(file))
    with pytest.raises(InputError, match="the model has 2048 positions"):
        bench.run("opt", described(OPT), ("bf16",), (Case("decode", 1, 2048),))


def test_a_configuration_in_a_file(tmp_path):
    model = variants.write_checkpoint(tmp_path, variants.VARIANTS["llama-grouped"])
    name, config = architecture(str(model / "config.json"))
    assert name == "LlamaForCausalLM" and config.vocab_size == variants.VARIANTS["llama-grouped"]["vocab_size"]
