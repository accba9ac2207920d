"""Flattening is exact: on integers to the last bit."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fqjax.core.channels import PADDING, count_pieces, flatten_codes, gather_codes, lay_out, piece, rounded_up

QMAX = st.sampled_from([7, 127])
# Sizes come from short lists, so that few shapes have to be compiled.


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(-2000, 2000), min_size=16, max_size=16), qmax=QMAX)
def test_the_pieces_of_an_integer_sum_to_it(values, qmax):
    codes = np.array(values)
    n = max(1, -(-np.abs(codes).max() // qmax))
    parts = [np.asarray(piece(jnp.asarray(codes), a, qmax)) for a in range(n)]
    np.testing.assert_array_equal(sum(parts), codes)
    assert max(np.abs(part).max() for part in parts) <= qmax
    assert not np.asarray(piece(jnp.asarray(codes), int(n), qmax)).any()


@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from([1, 7, 40]),
    rows=st.sampled_from([1, 5]),
    n=st.sampled_from([1, 6]),
    qmax=QMAX,
    multiple=st.sampled_from([128, 256]),
    seed=st.integers(0, 2**32 - 1),
)
def test_flattening_both_operands_keeps_the_product(k, rows, n, qmax, multiple, seed):
    rng = np.random.default_rng(seed)
    x_pieces, w_pieces = rng.integers(1, 4, k), rng.integers(1, 4, k)
    x = rng.integers(-qmax * x_pieces, qmax * x_pieces + 1, (rows, k))
    w = rng.integers(-qmax * w_pieces, qmax * w_pieces + 1, (n, k))
    extra = lay_out(x_pieces, w_pieces, k, multiple)
    source = jnp.asarray(extra.source)
    flat_x = flatten_codes(jnp.asarray(x), source, jnp.asarray(extra.x_part), qmax)
    flat_w = flatten_codes(jnp.asarray(w), source, jnp.asarray(extra.w_part), qmax)
    assert flat_x.shape[1] == flat_w.shape[1] == extra.width
    assert extra.width == rounded_up(int((x_pieces * w_pieces).sum()), multiple)
    assert extra.used == (x_pieces * w_pieces - 1).sum()
    np.testing.assert_array_equal(np.asarray(flat_x, np.int64) @ np.asarray(flat_w, np.int64).T, x @ w.T)


def test_padding_channels_are_zero_whatever_the_code():
    codes = jnp.asarray([[2000, -2000, 127]])
    flat = flatten_codes(codes, jnp.zeros(5, jnp.int32), jnp.full(5, PADDING, jnp.int32), 127)
    assert not np.asarray(flat)[:, 3:].any()


def test_extra_channels_follow_their_channel_in_order():
    extra = lay_out(np.array([1, 2, 1]), np.array([1, 2, 3]), 3, 128)
    pairs = list(zip(extra.source, extra.x_part, extra.w_part, strict=True))[: extra.used]
    assert pairs == [(1, 0, 1), (1, 1, 0), (1, 1, 1), (2, 0, 1), (2, 0, 2)]


def test_nothing_is_added_where_nothing_is_large():
    extra = lay_out(np.ones(128, int), None, 128, 128)
    assert extra.used == 0 and extra.source.size == 0


@settings(max_examples=40, deadline=None)
@given(
    k=st.sampled_from([1, 7, 40]),
    n=st.sampled_from([1, 6]),
    qmax=QMAX,
    whole=st.sampled_from(["neither", "activations", "weights"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_flattened_weight_can_be_gathered_again(k, n, qmax, whole, seed):
    rng = np.random.default_rng(seed)
    x_pieces, w_pieces = rng.integers(1, 4, k), rng.integers(1, 4, k)
    x_given, w_given = None if whole == "activations" else x_pieces, None if whole == "weights" else w_pieces
    limit = qmax * (1 if w_given is None else w_pieces)
    w = rng.integers(-limit, limit + 1, (n, k))
    laid_out = lay_out(x_given, w_given, k, 128)
    source = jnp.asarray(laid_out.source)
    flat = flatten_codes(jnp.asarray(w), source, jnp.asarray(laid_out.w_part), qmax)
    codes, pieces = gather_codes(flat, source, jnp.asarray(laid_out.x_part))
    np.testing.assert_array_equal(codes, w)
    np.testing.assert_array_equal(pieces, np.ones(k) if x_given is None else x_pieces)


def test_channels_are_padded_up_to_a_multiple():
    assert [rounded_up(n, 128) for n in (1, 128, 129)] == [128, 128, 256] and rounded_up(257, 256) == 512


def test_a_channel_needs_a_second_piece_when_its_code_does():
    maxima = jnp.asarray([0.0, 1.0, 1.07, 1.08, 2.0, 2.1])
    assert count_pieces(maxima, 1.0, 7).tolist() == [1, 1, 1, 2, 2, 3]
