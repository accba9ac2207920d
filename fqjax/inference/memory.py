"""How an engine's key-value memory is laid out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fqjax.inference.pages import Pages
from fqjax.inference.settings import check_memory, empty_cache
from fqjax.inference.slots import Piece, Rows
from fqjax.layers.flattened import Structure
from fqjax.models.cache import KeyValueCache, Kind
from fqjax.models.causal_lm import GenerativeModel

PAGE = 64
"""Tokens of a page."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """In pages, or, for a model that reads none, in a row for each slot.

    Attributes:
      pages: which are free; rows, where a slot has one.
      table: pages of a slot; 0 for rows.
      rows: how rows are made; None for pages.
    """

    pages: Pages
    table: int
    rows: Rows | None

    @classmethod
    def of(
        cls,
        model: GenerativeModel,
        structure: Structure,
        slots: int,
        capacity: int,
        tokens: int | None,
        widest: int,
        kv_cache: Kind | None,
        shares: bool,
    ) -> "Memory":
        """Memory for so many tokens, which the device has.

        Raises:
          InputError: if it has not.
        """
        asked = f"slots {slots}, capacity {capacity}"
        if getattr(model, "reads_pages", False):
            size = min(PAGE, capacity)
            most = -(-capacity // size)
            count = slots * most if tokens is None else -(-tokens // size)
            check_memory(model, structure, count, size, kv_cache, asked)  # Before a list of so many is made.
            return cls(Pages(count, size, shares), most, None)
        # Whole pieces fit: a write past the capacity would be moved back before it.
        size = -(-capacity // widest) * widest
        check_memory(model, structure, slots, size, kv_cache, asked)
        return cls(Pages(slots, size, shares=False), 0, Rows(size, kv_cache))

    def make(self, model: GenerativeModel, slots: int, kv_cache: Kind | None) -> KeyValueCache:
        """The empty cache."""

        @jax.jit
        def make() -> KeyValueCache:
            if self.rows is not None:
                return empty_cache(model, slots, *self.rows)
            cache = empty_cache(model, self.pages.count + 1, self.pages.size, kv_cache).pooled()
            lengths, table = jnp.zeros(slots, jnp.int32), jnp.zeros((slots, self.table), jnp.int32)
            return KeyValueCache(cache.layers, lengths, table)

        return make()

    def empty_piece(self, rows: int, width: int, slots: int) -> Piece:
        """Pieces of nobody's prompts."""
        pages = None if self.rows is not None else np.zeros((rows, self.table), np.int32)
        counts, starts = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        return Piece(np.zeros((rows, width), np.int32), counts, starts, np.full(rows, slots, np.int32), pages)
