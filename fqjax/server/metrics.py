"""What the server has done and does, in the text form that Prometheus reads (version 0.0.4)."""

import bisect
import time
from collections import Counter

TO_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0, 30.0, 60.0)
TO_NEXT = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Upper ends of the bins of times in seconds."""

OUTCOMES = ("stop", "length", "cancelled", "error", "refused")
"""How requests end: by a token or a string, by their limit, by the client, by a failure, and before they began."""


class Histogram:
    """Counts of values in bins.

    Args:
      ends: upper ends of the bins, ascending; a last bin has none.
    """

    def __init__(self, ends: tuple[float, ...]):
        self.ends, self.counts, self.sum = ends, [0] * (len(ends) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect.bisect_left(self.ends, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """Its samples."""
        found, so_far = [], 0
        for end, count in zip([*map(str, self.ends), "+Inf"], self.counts, strict=True):
            so_far += count
            found.append(f'{name}_bucket{{le="{end}"}} {so_far}')
        return [*found, f"{name}_sum {self.sum:.9g}", f"{name}_count {so_far}"]


class Clock:
    """When the tokens of one request came.

    Args:
      metrics: where they are counted.
      began: when the request came, in seconds of ``time.perf_counter``.
    """

    def __init__(self, metrics: "Metrics", began: float):
        self._metrics, self._last, self._first = metrics, began, True

    def token(self) -> None:
        """A token has come."""
        now = time.perf_counter()
        (self._metrics.to_first if self._first else self._metrics.to_next).add(now - self._last)
        self._last, self._first = now, False
        self._metrics.output_tokens += 1


class Metrics:
    """Counts since the server began; called by the thread of its event loop alone."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.prompt_tokens = self.output_tokens = 0
        self.to_first, self.to_next = Histogram(TO_FIRST), Histogram(TO_NEXT)

    def ended(self, outcome: str, count: int = 1) -> None:
        """Requests have ended."""
        self.outcomes[outcome] += count

    def text(self, running: int, waiting: int, held: int, in_all: int) -> str:
        """All of it.

        Args:
          running: requests that have a slot.
          waiting: requests that wait for one.
          held: tokens for which requests have key-value memory.
          in_all: tokens that this memory holds.
        """
        counted = [f'fqjax_requests_total{{outcome="{name}"}} {count}' for name, count in self.outcomes.items()]
        lines = [
            *_described("fqjax_requests_total", "counter", "Requests that have ended, by how.", counted),
            *_one("fqjax_requests_running", "gauge", "Requests that have a slot.", running),
            *_one("fqjax_requests_waiting", "gauge", "Requests that wait for a slot.", waiting),
            *_one("fqjax_prompt_tokens_total", "counter", "Tokens of prompts taken.", self.prompt_tokens),
            *_one("fqjax_output_tokens_total", "counter", "Tokens handed out.", self.output_tokens),
            *_one("fqjax_kv_cache_tokens_held", "gauge", "Tokens with key-value memory.", held),
            *_one("fqjax_kv_cache_tokens", "gauge", "Tokens that the key-value memory holds.", in_all),
        ]
        for name, words, histogram in (
            ("fqjax_time_to_first_token_seconds", "From a request to its first token.", self.to_first),
            ("fqjax_time_per_output_token_seconds", "From a token to the next one.", self.to_next),
        ):
            lines += _described(name, "histogram", words, histogram.lines(name))
        return "\n".join(lines) + "\n"


def _described(name: str, kind: str, words: str, samples: list[str]) -> list[str]:
    return [f"# HELP {name} {words}", f"# TYPE {name} {kind}", *samples]


def _one(name: str, kind: str, words: str, value: int) -> list[str]:
    return _described(name, kind, words, [f"{name} {value}"])
