"""Pages of key-value memory: which are free, which hold what, and which begin like a new prompt.

A request takes as many pages as its prompt and its continuation can fill, when it gets its slot, and gives them back when it
ends, so that no request has to be put aside halfway.  Whole pages of a prompt are kept after that, as long as there are other
free ones: a prompt that begins with the same tokens shares them (system prompts, turns of a conversation).  Of those that
nobody uses, the least recently used is given away first.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

Key = tuple[int, bytes]
"""The number of the content that stands before a page, and the page's own tokens: equal keys are equal prefixes."""

ROOT = 0
"""The number of what stands before a first page, which is nothing."""


@dataclasses.dataclass
class _Page:
    """A page that holds, or will hold, tokens of a prompt.

    Attributes:
      users: requests that have it.
      key: what it holds; None if that is nobody else's to know.
      content: the number of what it holds with all that stands before.
    """

    users: int = 0
    key: Key | None = None
    content: int = ROOT


class Pages:
    """A pool of pages, by their numbers from 1 on; 0 is what belongs to nobody.

    Args:
      count: pages, without page 0.
      size: tokens of a page.
      shares: whether prompts share what they begin with.
    """

    def __init__(self, count: int, size: int, shares: bool = True):
        self.size, self.shares, self.count = size, shares, count
        self._pages = [_Page() for _ in range(count + 1)]
        self._free = list(range(count, 0, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[Key, int] = {}
        self._contents = ROOT

    @property
    def used(self) -> int:
        """Pages that requests have."""
        return self.count - self.available

    @property
    def available(self) -> int:
        """Pages that nobody has, those among them that are kept for prompts to come."""
        return len(self._free) + len(self._kept)

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.size)

    def take(self, prompt: Int32[np.ndarray, " tokens"], tokens: int) -> tuple[list[int], int] | None:
        """Pages for a request, and how many of its prompt's tokens they hold already; None if there are too few free ones.

        Args:
          prompt: the request's tokens.
          tokens: how many it has at most, those of its continuation among them.
        """
        shared = [page for _, page in self._held(prompt)]
        # A shared page that nobody uses is no longer there to be taken for anything else.
        unused = sum(not self._pages[page].users for page in shared)
        if self.needed(tokens) - len(shared) > self.available - unused:
            return None
        for page in shared:
            self._pages[page].users += 1
            self._kept.pop(page, None)
        own = [self._take_one() for _ in range(self.needed(tokens) - len(shared))]
        return shared + own, len(shared) * self.size

    def publish(self, prompt: Int32[np.ndarray, " tokens"], pages: list[int], written: int) -> None:
        """Lets others share the pages of a prompt of which so many tokens have been written, or will be before theirs."""
        before = ROOT
        for at, page in enumerate(pages[: written // self.size] if self.shares else []):
            key = before, prompt[at * self.size : (at + 1) * self.size].tobytes()
            holder = self._by_key.setdefault(key, page)
            if holder == page and self._pages[page].key is None:
                self._contents += 1
                self._pages[page] = _Page(self._pages[page].users, key, self._contents)
            before = self._pages[holder].content

    def give_back(self, pages: list[int]) -> None:
        """Frees the pages of a request.  The last of them are given away first, since they share least."""
        for page in reversed(pages):
            held = self._pages[page]
            held.users -= 1
            if not held.users:
                if held.key is None:
                    self._free.append(page)
                else:
                    self._kept[page] = None

    def _held(self, prompt: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pages that hold a prompt's beginning, with their places; one token at least is left to be computed."""
        before = ROOT
        for at in range((len(prompt) - 1) // self.size if self.shares else 0):
            page = self._by_key.get((before, prompt[at * self.size : (at + 1) * self.size].tobytes()))
            if page is None:
                return
            yield at, page
            before = self._pages[page].content

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            key = self._pages[page].key
            assert key is not None
            del self._by_key[key]
        self._pages[page] = _Page(users=1)
        return page
