"""Malformed arguments of public functions: one line that names the argument, before anything is computed or written."""

import re
import string

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fqjax
from fqjax.cli.main import main
from fqjax.data.text import usual_window
from fqjax.inference.engine import Engine
from fqjax.inference.requests import Request
from fqjax.inference.serve import serve
from fqjax.methods import IntegerScale
from fqjax.models.llama import Llama, LlamaConfig
from fqjax.runtime.errors import InputError
from tests.inference.test_generate import WithoutPrefill


def short(value):
    """A value in few characters, the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))[:30]


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def llama():
    return Llama(LlamaConfig(**SIZES, **HEADS, bos_token_id=1), dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def mlp():
    return nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 4, rngs=nnx.Rngs(1)))


few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NO_ENDS = [[None], ["1"], [1.5], 3j, object(), [[1]]]
NO_NUMBERS = [
    None,
    "3",
    b"3",
    [],
    [3],
    (1, 2),
    {},
    {3},
    object(),
    3j,
    True,
    np.array([1, 2]),
    np.zeros((0,)),
    lambda: 3,
]
SHORT_TEXT = st.text(string.printable, max_size=80)
junk = st.one_of(st.sampled_from(NO_NUMBERS), SHORT_TEXT, st.lists(st.integers(), max_size=3))
"""Values that are no number."""

not_finite = st.sampled_from([float("nan"), float("inf"), -float("inf"), np.float32("nan"), 10**400, -(10**400)])
fractions = st.floats(allow_nan=True, allow_infinity=True).filter(lambda x: x != x or x in (np.inf, -np.inf) or x % 1)
large = st.integers(2**31, 10**40)
no_whole = st.one_of(junk, fractions, not_finite.filter(lambda x: not isinstance(x, int)))
no_count = st.one_of(no_whole, large, st.integers(-(10**40), 0))
"""Values that are no whole number from 1 to 2**31 - 1."""
no_path = st.one_of(st.sampled_from([None, 3, 1.5, b"x", "", "a\0b", [], object(), True]), st.binary(max_size=3))
no_module = st.one_of(st.sampled_from([None, 3, "model", {}, [], object(), nnx.Linear, lambda x: x, np.ones(3)]))


def refused(name, call, *args, **kwargs):
    """Expects one line that names the argument."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and text.isprintable() and name in text and len(text) < 600, text


@few
@given(value=no_count)
@pytest.mark.parametrize("name", ["max_new_tokens", "prefill_chunk"])
def test_counts_of_generation(llama, name, value):
    refused(name, fqjax.generate, llama, [5], **{"max_new_tokens": 2, name: value})


@few
@given(value=no_whole)
def test_seeds_of_generation(llama, value):
    refused("seed", fqjax.generate, llama, [5], 2, seed=value)


@few
@given(value=st.one_of(junk, not_finite, st.floats(max_value=-1e-300), st.floats(1e31, 1e300), st.floats(1e-300, 1e-7)))
def test_temperatures(llama, value):
    refused("temperature", fqjax.generate, llama, [5], 2, temperature=value)


@few
@given(value=st.one_of(junk, not_finite, st.floats(max_value=0.0), st.floats(1.0, exclude_min=True)))
def test_nuclei(llama, value):
    refused("top_p", fqjax.generate, llama, [5], 2, top_p=value)


@few
@given(
    value=st.one_of(
        SHORT_TEXT.filter(bool), fractions, st.sampled_from([[None], ["1"], [1.5], 3j, object(), [[1]]]), large
    )
)
def test_tokens_that_end_a_text(llama, value):
    refused("eos_token_id", fqjax.generate, llama, [5], 2, eos_token_id=value)


def test_small_whole_numbers_of_numpy_do_not_overflow(llama, mlp):
    ids = np.arange(300, dtype=np.int8) % 64
    wanted = fqjax.perplexity(llama, ids, 64, windows=3, batch_size=2, bos_token_id=1)
    small = {"windows": np.uint8(3), "batch_size": np.int8(2), "bos_token_id": np.int8(1)}
    assert fqjax.perplexity(llama, ids, np.int8(64), **small) == wanted
    (batch, *_) = fqjax.calibration_batches(ids, llama.config, samples=np.int8(2), window=np.int8(64))
    assert batch.shape == (2, 64)
    found = fqjax.calibrate(mlp, [X] * 50, ["layers.0"], sample_rows=np.uint8(255))
    assert found["layers.0"].samples.shape == (150, 4)
    assert fqjax.Scheme("small", "", IntegerScale(amplifier=np.int16(64)), sample_rows=np.uint8(9)).sample_rows == 9
    refused("amplifier=3: expected a power", fqjax.integer_scales, mlp, np.int8(3))
    engine = Engine(WithoutPrefill(llama), slots=np.int8(1), capacity=np.int8(127), chunk=np.int8(100))
    request = Request(prompt=[5] * 60, max_new_tokens=np.int8(100))
    refused("request: 60 tokens and 100 new ones", engine.submit, request)
    settings = {"temperature": np.float16(0.5), "top_p": np.float16(0.5), "seed": np.uint8(255)}
    drawn = fqjax.generate(llama, np.full(63, 5, np.int8), np.int8(1), **settings, prefill_chunk=np.int8(64))
    np.testing.assert_array_equal(drawn, fqjax.generate(llama, [5] * 63, 1, 0.5, 0.5, 255))


MASKED = np.ma.masked_greater(np.full((2, 8), 5), 8)


def test_masks_are_not_lost(llama, mlp):
    for data in ([MASKED], [(MASKED,)], [{"x": MASKED}], [list(MASKED)]):
        refused("calibration: batch 0: a masked array", fqjax.quantize, mlp, "w8a8", data)
    refused("calibration: batch 0: a masked array", fqjax.quantize, llama, "w8a8", [MASKED])
    for prompt in (MASKED, MASKED[0], [MASKED[0], [3]]):
        refused("prompt: a masked array", fqjax.generate, llama, prompt, 2)
    refused("token_ids: a masked array", fqjax.perplexity, llama, MASKED[0], 4)
    refused("eos_token_id: a masked array", fqjax.generate, llama, [5], 2, eos_token_id=MASKED[0])


@pytest.mark.parametrize("token", [2**31, -(2**31), 2**63 - 1, -(2**63), np.uint64(2**64 - 1)], ids=str)
def test_tokens_that_32_bits_do_not_hold(llama, token):
    """Of a model that does not say what its vocabulary is, too."""
    refused(f"token {token}", fqjax.generate, WithoutPrefill(llama), [[5], [token]], 2)
    refused(f"token {token}", fqjax.perplexity, Anything(), np.array([token] * 16), 4, bos_token_id=1)
    refused(f"eos_token_id {token}", fqjax.generate, llama, [5], 2, eos_token_id=token)


class Anything(nnx.Module):
    def __call__(self, tokens):
        return jnp.zeros((*tokens.shape, 64))


@pytest.mark.parametrize("end", [np.array(7), jnp.array(7), np.array([7]), np.int8(7), (np.uint8(7),)], ids=short)
def test_arrays_of_tokens_that_end_a_text(llama, end):
    found = fqjax.generate(llama, [5], 2, eos_token_id=end)
    np.testing.assert_array_equal(found, fqjax.generate(llama, [5], 2, eos_token_id=[7]))


@pytest.mark.parametrize("end", [np.array(7.0), np.array("7"), np.array([[7]]), jnp.zeros(2)], ids=short)
def test_arrays_that_are_no_tokens_that_end_a_text(llama, end):
    refused("eos_token_id", fqjax.generate, llama, [5], 2, eos_token_id=end)


BAD_PROMPTS = [
    None,
    3,
    "text",
    b"text",
    [],
    [[]],
    [[1], []],
    [1.5],
    [[1], 2],
    [None],
    ["a"],
    [[["a"]]],
    {1: 2},
    {1, 2},
    3j,
]
BAD_PROMPTS += [
    np.array(3),
    np.zeros((0,), int),
    np.zeros((1, 0), int),
    np.zeros((1, 1, 1), int),
    np.ones(2),
    [10**400],
]
BAD_PROMPTS += [
    [64],
    [-1],
    [10**30],
    np.array([[1, 64]]),
    jnp.array(3),
    object(),
    iter([1]),
    [object()],
    [[1], "a"],
    [1, [2]],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=short)
def test_prompts(llama, prompt):
    with pytest.raises(InputError, match=r"^(prompt|token)") as caught:
        fqjax.generate(llama, prompt, 2)
    assert "\n" not in str(caught.value)
    request = Request(prompt=prompt, max_new_tokens=2)
    (finished,) = serve(llama, [request], slots=1, capacity=8, chunk=4)
    assert finished.request is request and finished.reason == "refused" and not finished.tokens.size
    assert finished.error and "\n" not in finished.error


def test_no_more_tokens_than_the_model_has_positions(llama):
    for count in (64, 10**6, 10**9):
        refused("positions", fqjax.generate, llama, [5], count)
        refused("positions", Engine(llama, slots=1, capacity=2**10).submit, Request(prompt=[5] * 60, max_new_tokens=5))


def test_a_cache_larger_than_the_memory_is_refused_before_it_is_made(llama):
    refused("max_new_tokens 1000000000: a cache", fqjax.generate, WithoutPrefill(llama), [[5]] * 64, 10**9)
    refused("slots 64, capacity 1000000000: a cache", Engine, WithoutPrefill(llama), slots=64, capacity=10**9)


@few
@given(value=no_module)
@pytest.mark.parametrize(
    "call",
    [
        lambda model: fqjax.quantize(model, "w8a8", [np.ones((2, 4))]),
        lambda model: fqjax.integer_scales(model),
        lambda model: fqjax.generate(model, [1]),
        lambda model: fqjax.perplexity(model, [1] * 20, 4),
        lambda model: fqjax.calibrate(model, [np.ones((2, 4))], ["layers.0"]),
        lambda model: fqjax.save("there-is-none", model),
        lambda model: fqjax.save_compressed_tensors("there-is-none", model),
        lambda model: fqjax.report_of(model),
        lambda model: serve(model, []),
    ],
    ids="quantize integer_scales generate perplexity calibrate save save_compressed_tensors report_of serve".split(),
)
def test_models(call, value):
    refused("model", call, value)


CALLS_OF_MODELS = {
    "quantize": lambda model, path: fqjax.quantize(model, "w8a8", [np.full((2, 8), 5)]),
    "generate": lambda model, path: fqjax.generate(model, [5], 2),
    "serve": lambda model, path: serve(model, []),
    "perplexity": lambda model, path: fqjax.perplexity(model, [5] * 20, 4),
    "calibrate": lambda model, path: fqjax.calibrate(model, [np.full((2, 8), 5)], ["layers.0.mlp.down_proj"]),
    "integer_scales": lambda model, path: fqjax.integer_scales(model),
    "save": lambda model, path: fqjax.save(path / "out", model),
    "save_compressed_tensors": lambda model, path: fqjax.save_compressed_tensors(path / "out", model),
}


@pytest.mark.parametrize("name", CALLS_OF_MODELS)
def test_models_without_values(name, tmp_path):
    abstract = nnx.eval_shape(lambda: Llama(LlamaConfig(**SIZES, **HEADS), rngs=nnx.Rngs(0)))
    refused("is a shape without values, as of nnx.eval_shape", CALLS_OF_MODELS[name], abstract, tmp_path)
    deleted = Llama(LlamaConfig(**SIZES, **HEADS), rngs=nnx.Rngs(0))
    deleted.lm_head.kernel.get_value().delete()
    refused("model: lm_head.kernel has been deleted", CALLS_OF_MODELS[name], deleted, tmp_path)
    assert not list(tmp_path.iterdir())


class Giving(nnx.Module):
    """Gives something made of its logits."""

    def __init__(self, model, change):
        self.model, self.change, self.config = model, change, model.config

    def __call__(self, tokens):
        return self.change(self.model(tokens))

    def make_cache(self, batch, capacity):
        return self.model.make_cache(batch, capacity)

    def extend(self, tokens, cache, counts):
        logits, cache = self.model.extend(tokens, cache, counts)
        changed = self.change(logits)
        return changed if isinstance(changed, tuple) else (changed, cache)


def failing(logits):
    raise TypeError("no\nlogits")


NO_LOGITS = {
    "one value a token": lambda logits: logits[..., 0],
    "an axis more": lambda logits: logits[None],
    "whole numbers": lambda logits: jnp.argsort(logits),
    "complex numbers": lambda logits: logits * 1j,
    "a tuple": lambda logits: (logits, logits, logits),
    "another cache": lambda logits: (logits, logits),
    "a dictionary": lambda logits: {"logits": logits},
    "nothing": lambda logits: None,
    "an error": failing,
}


@pytest.mark.parametrize("name", NO_LOGITS)
def test_models_that_give_no_logits(llama, name):
    model = Giving(llama, NO_LOGITS[name])
    refused("model: ", fqjax.perplexity, model, [5] * 20, 4)
    refused("model: ", fqjax.generate, model, [5], 2)
    refused("model: ", serve, model, [])


def test_as_many_windows_at_once_as_there_are(llama):
    few = fqjax.perplexity(llama, [5] * 50, 8, batch_size=7)
    assert fqjax.perplexity(llama, [5] * 50, 8, batch_size=2**31 - 1) == few


def test_logits_larger_than_the_memory_are_refused(llama, monkeypatch):
    monkeypatch.setattr("fqjax.evaluation.perplexity.memory_bytes", lambda: 10_000)
    refused("batch_size 6: the logits take", fqjax.perplexity, llama, [5] * 54, 10, batch_size=10**6)


@pytest.mark.parametrize("call", [lambda m: fqjax.generate(m, [1]), lambda m: serve(m, [])], ids=["generate", "serve"])
def test_a_module_that_cannot_generate(mlp, call):
    refused("has no method 'extend'", call, mlp)


@few
@given(value=no_path)
@pytest.mark.parametrize("function", [fqjax.load, fqjax.load_hf, fqjax.load_tokenizer], ids=lambda f: f.__name__)
def test_paths_to_read(function, value):
    refused("path" if function is not fqjax.load_tokenizer else "directory", function, value)


@few
@given(value=no_path)
def test_paths_to_write(mlp, value):
    refused("path", fqjax.save, value, mlp)
    refused("path", fqjax.save_compressed_tensors, value, mlp)


@pytest.mark.parametrize("value", [5, "x", [], {}, object(), np.ones(2)], ids=short)
def test_what_is_saved_beside_a_model(mlp, value, tmp_path):
    refused("report ", fqjax.save, tmp_path / "out", mlp, report=value)
    refused("tokenizer ", fqjax.save, tmp_path / "out", mlp, tokenizer=value)
    refused("tokenizer ", fqjax.save_compressed_tensors, tmp_path / "out", mlp, tokenizer=value)
    refused("sharding ", fqjax.load, tmp_path, mlp, sharding=value)
    assert not list(tmp_path.iterdir())


X = np.ones((3, 4), np.float32)
BAD_DATA = {
    "a number": 3,
    "a text": "text",
    "bytes": b"text",
    "an array": X,
    "a mapping": {"x": X},
    "a function": lambda: [X],
    "nothing in it": [],
    "None in it": [None],
    "an object in it": [object()],
    "a text in it": ["text"],
    "texts in it": [["a", "b"]],
    "an array of objects": [np.array([None, 1])],
    "an array of texts": [np.array(["a"])],
    "complex numbers": [X.astype(complex)],
    "ragged lists": [[[1.0, 2.0], [3.0]]],
    "a scalar": [np.float32(1)],
    "numbers": [1.0, 2.0],
    "no rows": [np.ones((0, 4))],
    "no columns": [np.ones((3, 0))],
    "an empty list": [[]],
    "an empty tuple": [()],
    "an empty mapping": [{}],
    "another width": [np.ones((3, 5))],
    "a later batch of another width": [X, X[:, :3]],
    "too many arguments": [(X, X)],
    "an unknown name": [{"y": X}],
    "not finite": [X * np.nan],
    "infinite": [X, X * np.inf],
    "too large": [X * 1e30],
    "too small": [X * 1e-30],
    "dates": [np.array(["2020-01-01"], "datetime64[D]")],
    "large whole numbers": [np.full((3, 4), 2**40)],
}


@pytest.mark.parametrize("data", BAD_DATA)
def test_calibration_data(mlp, data):
    refused("calibration", fqjax.quantize, mlp, "w8a8", BAD_DATA[data])
    if not isinstance(BAD_DATA[data], dict) and data not in ("too large", "too small"):
        refused("calibration", fqjax.calibrate, mlp, BAD_DATA[data], ["layers.0"])


IDS = np.full((2, 8), 5)
BAD_TOKENS = [
    IDS[0, 0],
    IDS[None],
    IDS.astype(float),
    np.full((2, 8), 64),
    -IDS,
    np.zeros((2, 65), int),
    (IDS, IDS),
    {"x": IDS},
]
BAD_TOKENS += [
    {"input_ids": IDS, "attention_mask": IDS * 0},
    {"tokens": IDS, "input_ids": IDS},
    [[1, 2], 3],
    "text",
    None,
]


@pytest.mark.parametrize("batch", BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_calibration_data_of_a_language_model(llama, batch):
    refused("calibration: batch 0: ", fqjax.quantize, llama, "w8a8", [batch])


@few
@given(value=st.one_of(st.sampled_from([None, 3, 1.5, True, [], {}, object(), b"w8a8"]), SHORT_TEXT))
def test_schemes(mlp, value):
    refused("scheme", fqjax.quantize, mlp, value, [X])


@few
@given(
    value=st.sampled_from([3, "layers", b"x", None, [3], [None], [b"x"], {"a": 1}, 1.5, object(), ["("], ["nowhere"]])
)
def test_patterns_of_what_to_ignore(mlp, value):
    refused("ignore", fqjax.quantize, mlp, "w8a8", [X], ignore=value)


@few
@given(value=no_count.filter(lambda value: value is not None))
@pytest.mark.parametrize("name", ["window", "windows", "batch_size"])
def test_counts_of_perplexity(llama, name, value):
    if name == "windows" and isinstance(value, int) and value > 1:
        return  # There are not as many; all are taken.
    told = "token" if name == "window" and isinstance(value, int) and value > 1 else name
    refused(told, fqjax.perplexity, llama, [5] * 50, **{"window": 8, name: value})


def test_a_window_has_no_more_tokens_than_the_model_has_positions(llama):
    refused("128 tokens is longer than the 64 positions", fqjax.perplexity, llama, [5] * 200, 128)
    assert usual_window(None, llama.config) == 64 and usual_window(128, llama.config) == 128
    assert usual_window(None, None) == 512


@pytest.mark.parametrize(
    "ids", [None, 3, "text", [], [1.5], ["a"], [[1], [2, 3]], np.array(3), [10**400], [None], object()], ids=short
)
def test_texts_of_perplexity(llama, ids):
    refused("token", fqjax.perplexity, llama, ids, 8)


@few
@given(value=no_count)
@pytest.mark.parametrize("name", ["slots", "capacity", "chunk", "burst"])
def test_sizes_of_a_engine(llama, name, value):
    refused(name, serve, llama, [], **{"slots": 1, "capacity": 8, name: value})


@pytest.mark.parametrize("asked", [None, 3, "text", {}, Request(prompt=[1])], ids=short)
def test_what_is_no_iterable_of_requests(llama, asked):
    refused("requests", serve, llama, asked, slots=1, capacity=8)


@few
@given(value=st.one_of(no_whole, st.sampled_from([0, 3, -1, 2**21, 10**30])))
def test_amplifiers(mlp, value):
    refused("amplifier", fqjax.integer_scales, mlp, value)


@pytest.mark.parametrize("value", [None, 3, "yes", [], np.ones(2)], ids=short)
def test_truth_values(mlp, value, tmp_path):
    refused("units", fqjax.integer_scales, mlp, units=value)
    refused("verify", fqjax.load, tmp_path, verify=value)


@few
@given(value=no_count)
def test_what_calibration_keeps(mlp, value):
    refused("sample_rows", fqjax.calibrate, mlp, [X], ["layers.0"], sample_rows=value)


NO_KINDS = [3, 1.5, "", "int4", b"int8", [], ["int8"], {}, np.ones(2), object()]


@pytest.mark.parametrize("value", NO_KINDS, ids=short)
def test_kinds_of_caches(llama, value):
    refused("kv_cache", fqjax.generate, llama, [5], 2, kv_cache=value)
    refused("kv_cache", fqjax.stream, llama, [5], 2, kv_cache=value)
    refused("kv_cache", serve, llama, [], slots=1, capacity=8, kv_cache=value)
    refused("kv_cache", fqjax.perplexity, llama, [5] * 20, 8, kv_cache=value)


@pytest.mark.parametrize("value", [3, b"x", np.ones(2), float("nan"), object()], ids=short)
def test_settings_and_reports(mlp, value):
    refused("dtype", fqjax.load_hf, "there-is-none", value)
    refused("pattern", fqjax.Rule, value, "int8")
    refused("name", fqjax.Scheme, value, "", None)
    refused("record", fqjax.report_of, mlp, record=value)
    refused("skipped", fqjax.report_of, mlp, skipped=value)
    if not isinstance(value, int):
        refused("seconds", fqjax.report_of, mlp, value)


@pytest.mark.parametrize("names", [None, 3, "layers.0", ["nowhere"], [3], [""]], ids=short)
def test_names_of_layers_to_calibrate(mlp, names):
    refused("names", fqjax.calibrate, mlp, [X], names)


@pytest.mark.parametrize("value", [None, 3, "text", [], object()], ids=short)
def test_pieces_of_other_kinds(value):
    refused("scheme", fqjax.register_scheme, value)
    refused("array", fqjax.from_qwix, value)
    refused("layer", fqjax.to_qwix, value)
    refused("config", fqjax.calibration_batches, np.full(50, 5), value, samples=1, window=8)
    if not isinstance(value, str):
        refused("piece", fqjax.register, value)


OPTIONS = {
    "generate M --prompt A": {
        "--max-new-tokens": ["0", "-1", "1e3", "1.5", "nan", "", str(10**30), str(2**31)],
        "--temperature": ["nan", "inf", "-1", "x", "", "1e-40", "1e300"],
        "--top-p": ["nan", "inf", "0", "1.5", "x", "-1"],
        "--seed": ["1.5", "x", "nan", ""],
        "--kv-cache": ["int4", "", "INT8"],
    },
    "eval M --text F": {"--window": ["0", "1", "-5", "x", "1.5", "nan"], "--windows": ["0", "-1", "x", "nan"]},
    "convert M out": {
        "--samples": ["0", "-1", "x", "1.5"],
        "--window": ["0", "1", "-5", "x"],
        "--set": [
            "",
            "x",
            "x=1",
            "sample_rows=-1",
            "sample_rows=nan",
            "int4_share=nan",
            "int4_share=2",
            "alpha=inf",
            "head=3",
        ],
        "--scheme": ["", "x", "W8A8"],
    },
    "bench kernels": {"--rows": ["0", "-1", "x", "1.5"], "--shape": ["x", "0x1", "1x", "axb", "-1x128"]},
}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, options in OPTIONS.items()
        for option, values in options.items()
        for value in values
    ],
)
def test_options_of_the_command_line(command, option, value, capsys, tmp_path, checkpoint_of_options):
    words = {
        "M": str(checkpoint_of_options),
        "F": str(checkpoint_of_options / "config.json"),
        "out": str(tmp_path / "out"),
    }
    code = main([*(words.get(word, word) for word in command.split()), option, value])
    shown = capsys.readouterr()
    assert code == 2 and not shown.out and shown.err.count("\n") == 1, shown
    named = {
        option,
        option.removeprefix("--"),
        option.removeprefix("--").replace("-", "_"),
        option.removeprefix("--")[:-1],
    }
    assert any(name in shown.err for name in named) or (value and value.split("=")[0] in shown.err), shown.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def checkpoint_of_options(tmp_path_factory):
    from tests.conftest import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("options") / "source")
