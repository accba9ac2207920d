"""Malformed schemes, patterns, counts and pieces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fqjax
from fqjax.inference.requests import Request
from fqjax.inference.serve import serve
from tests.arguments.values import SHORT_TEXT, X, few, no_count, no_whole, refused, short


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
def test_truth_values(mlp, llama, value, tmp_path):
    refused("shares_prefixes", serve, llama, [], slots=1, capacity=8, shares_prefixes=value)
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
