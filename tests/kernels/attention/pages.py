"""Caches of pages that hold what caches of rows do."""

import jax
import jax.numpy as jnp
import numpy as np


def in_pages(operands, page, spare=3):
    """The same operands with a cache of pages in some order, and the table; spare pages hold what must not be read.

    The capacity becomes whole pages.
    """
    qkv, lengths, rotation, cache = operands
    batch, capacity = cache[0].shape[:2]
    n = -(-capacity // page)
    order = np.random.default_rng(1).permutation(batch * n + spare)[: batch * n].reshape(batch, n).astype(np.int32)
    pools, rows = [], []
    for array in cache:
        hidden = np.nan if jnp.issubdtype(array.dtype, jnp.floating) else 99
        row = np.full((batch, n * page, *array.shape[2:]), hidden, np.asarray(array).dtype)
        row[:, :capacity] = array
        pool = np.full((batch * n + spare, page, *array.shape[2:]), hidden, row.dtype)
        pool[order] = row.reshape(batch, n, page, *array.shape[2:])
        pools.append(jnp.asarray(pool))
        rows.append(jnp.asarray(row))
    # Pages behind the length may be anybody's.
    table = np.where(np.arange(n) * page <= np.asarray(lengths)[:, None], order, 0)
    return (qkv, lengths, rotation, tuple(rows)), (qkv, lengths, rotation, tuple(pools)), jnp.asarray(table)


def check_pages(found, wanted, table, lengths):
    """Results of pages and of rows are the same bits, and so is what the cache holds of every sequence."""
    jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])
    for pool, row in zip(found[1], wanted[1], strict=True):
        held = np.asarray(pool)[np.asarray(table)].reshape(row.shape)
        filled = np.arange(row.shape[1]) <= np.asarray(lengths)[:, None]
        np.testing.assert_array_equal(held[filled], np.asarray(row)[filled])
