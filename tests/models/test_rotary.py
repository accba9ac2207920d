import math

import numpy as np
import pytest

from fqjax.models.rotary import frequencies, read_rope, rotation
from fqjax.runtime.errors import InputError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain = np.asarray(frequencies(16, 100.0, {}))
    turns = 64 * plain / (2 * math.pi)
    ratio = np.asarray(frequencies(16, 100.0, YARN | {"beta_fast": 4.0, "beta_slow": 1.0})) / plain
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.5], 1 / 4, rtol=1e-6)
    between = ratio[(turns < 4) & (turns > 1)]
    assert (between > 1 / 4).all() and (between < 1).all() and (np.diff(ratio) <= 1e-6).all()


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.3}, 1.3),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
    ],
)
def test_yarn_scales_queries_and_keys(entries, size):
    cos, sin = rotation(np.arange(5, dtype=np.int32), 8, 100.0, YARN | entries)
    np.testing.assert_allclose(np.hypot(cos, sin), np.full((5, 4), size), rtol=1e-6)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_old_and_new_configurations_say_the_same(kind):
    old = read_rope({"rope_theta": 500.0, "rope_scaling": {kind: "linear", "factor": 2.0}})
    new = read_rope({"rope_parameters": {kind: "linear", "factor": 2.0, "rope_theta": 500.0}})
    assert old == new == (500.0, {"rope_type": "linear", "factor": 2.0})
    assert read_rope({"rope_theta": 500.0, "rope_scaling": None}) == (500.0, {})


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not.*default, linear, llama3, yarn"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not supported"),
        ({"rope_type": "linear"}, "rope_type 'linear' needs 'factor'"),
        ({"rope_type": "linear", "factor": None}, "rope_type 'linear' needs 'factor'"),
        ({"rope_type": "linear", "factor": -2.0}, "factor -2.0: expected a number above 0"),
        ({"rope_type": "linear", "factor": math.nan}, "factor nan: expected"),
        ({"rope_type": "linear", "factor": True}, "factor True: expected"),
        ({"rope_type": "linear", "factor": "2"}, "factor '2': expected"),
        ({"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor 1.0: expected more than low"),
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type .yarn. needs .original_max_position_embeddings."),
        (YARN | {"truncate": 1}, "truncate 1 of rope_type 'yarn': expected true or false"),
        (YARN | {"beta_slow": 40.0}, "beta_fast 32: expected more than beta_slow 40.0"),
        ({"rope_theta": 1.0}, "rope_theta 1.0: expected a number above 1"),
        ({"rope_theta": math.inf}, "rope_theta inf: expected"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported; expected 1"),
        ({"full_attention": {"rope_theta": 5.0}}, "rope_parameters has entries for full_attention; expected the same"),
    ],
)
def test_scalings_that_are_refused(rope, message):
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_rope({"rope_parameters": rope})
