"""Serving requests out of an iterable, by an engine (:mod:`fqjax.inference.engine`)."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from fqjax.inference.engine import Engine
from fqjax.inference.requests import Finished, Request
from fqjax.models.cache import Kind
from fqjax.models.causal_lm import GenerativeModel
from fqjax.runtime.errors import InputError


def serve(
    model: GenerativeModel,
    requests: Iterable[Request],
    *,
    slots: int = 8,
    capacity: int = 2048,
    tokens: int | None = None,
    chunk: int = 2048,
    burst: int = 1,
    eos_token_id: int | Iterable[int] | None = None,
    kv_cache: Kind | None = None,
    shares_prefixes: bool = True,
) -> Iterator[Finished]:
    """Continues any number of prompts, and yields each as it ends.

    Args:
      model: as for :func:`fqjax.generate`.
      requests: read one at a time, as slots become free.  One that cannot be served is handed out as refused, and ends none
        of the others; an error of the iterable itself is raised when the requests before it have ended.
      slots, capacity, tokens, chunk, burst, eos_token_id, kv_cache, shares_prefixes: as for
        :class:`fqjax.inference.engine.Engine`.

    Yields:
      :class:`Finished`, in the order in which requests end.

    Raises:
      InputError: for settings out of range, when it is called.
    """
    engine = Engine(
        model,
        slots=slots,
        capacity=capacity,
        tokens=tokens,
        chunk=chunk,
        burst=burst,
        eos_token_id=eos_token_id,
        kv_cache=kv_cache,
        shares_prefixes=shares_prefixes,
    )
    if isinstance(requests, Mapping | str | bytes) or not isinstance(requests, Iterable):
        raise InputError(f"requests: expected an iterable of Request, got {type(requests).__name__}")
    return _serve(engine, requests)


def _serve(engine: Engine, requests: Iterable[Request]) -> Iterator[Finished]:
    failures: list[Exception] = []
    arriving = _until_failure(requests, failures)
    more = True
    while more or engine.busy:
        while more and engine.free:
            for request in itertools.islice(arriving, 1):
                try:
                    engine.submit(request)
                except InputError as error:
                    yield Finished(request=request, tokens=np.zeros(0, np.int32), reason="refused", error=str(error))
                break
            else:
                more = False
        yield from (output.finished for output in engine.step() if output.finished is not None)
    if failures:
        raise failures[0]


def _until_failure(requests: Iterable[Request], failures: list[Exception]) -> Iterator[Request]:
    """The requests up to one that could not be read; the error is kept."""
    try:
        yield from requests
    except Exception as error:  # The caller's code may raise anything; what it gave before is served first.
        failures.append(error)
