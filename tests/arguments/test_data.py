"""Malformed data for calibration and evaluation."""

import numpy as np
import pytest
from hypothesis import given

import fqjax
from fqjax.data.text import usual_window
from tests.arguments.values import (
    X,
    few,
    no_count,
    refused,
    short,
)

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
