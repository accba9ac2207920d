"""Values that are none of some kind, and what is expected of a function that is given one."""

import re
import string

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fqjax.runtime.errors import InputError


def short(value):
    """A value in few characters, the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))[:30]


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}


HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


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


class Anything(nnx.Module):
    def __call__(self, tokens):
        return jnp.zeros((*tokens.shape, 64))


X = np.ones((3, 4), np.float32)
