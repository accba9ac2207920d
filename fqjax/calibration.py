"""Calibration: run data through the model once and keep what quantization needs to know of every linear layer's input.

For each layer that is the largest magnitude of every input channel, and a fixed number of input rows drawn uniformly
from all that passed, on which errors are judged.  The rows are drawn by *bottom-k sampling*: each row gets a random
number, and those with the k largest numbers are kept; merging two such samples gives a sample of the union, so one pass
over data of unknown length suffices.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from fqjax.errors import InputError
from fqjax.progress import track
from fqjax.surgery import replace_modules

ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What calibration saw of one linear layer's input.

    Attributes:
      absmax: largest magnitude of each channel, float32 (K,).
      samples: some of the rows, float32 (S, K), in no particular order.
      rows: how many rows passed.
    """

    absmax: np.ndarray
    samples: np.ndarray
    rows: int


class _Statistic(nnx.Variable):
    """State that calibration accumulates; split from everything else a model holds."""


class Observer(nnx.Module):
    """Computes what its linear layer computes, and takes note of the input."""

    def __init__(self, linear: nnx.Linear, sample_rows: int):
        k = linear.in_features
        self.linear = linear
        self.absmax = _Statistic(jnp.zeros(k, jnp.float32))
        self.samples = _Statistic(jnp.zeros((sample_rows, k), jnp.float32))
        self.lots = _Statistic(jnp.full(sample_rows, -1.0, jnp.float32))
        self.rows = _Statistic(jnp.zeros((), jnp.uint32))

    def __call__(self, x: Float[Array, "... k"], *args: Any, **kwargs: Any) -> Array:
        self._note(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
        return self.linear(x, *args, **kwargs)

    def _note(self, x: Float32[Array, "rows k"]) -> None:
        kept = self.lots[...].shape[0]
        lots = jax.random.uniform(jax.random.fold_in(jax.random.key(0), self.rows[...]), x.shape[:1])
        # nnx Variables are written through [...]; the merged sample is the `kept` rows with the largest lots.
        self.lots[...], order = jax.lax.top_k(jnp.concatenate([self.lots[...], lots]), kept)
        old = jnp.take(self.samples[...], jnp.minimum(order, kept - 1), axis=0)
        new = jnp.take(x, jnp.maximum(order - kept, 0), axis=0)
        self.samples[...] = jnp.where((order < kept)[:, None], old, new)
        self.absmax[...] = jnp.maximum(self.absmax[...], jnp.max(jnp.abs(x), axis=0, initial=0))
        self.rows[...] = self.rows[...] + x.shape[0]


def calibrate(
    model: nnx.Module, batches: Iterable[Any], names: Iterable[str], *, sample_rows: int = 512
) -> dict[str, Statistics]:
    """Runs the batches through the model and returns the statistics of the named linear layers.

    Args:
      model: any NNX module; it is not changed.  Dropout is off and batch norms use their running averages.
      batches: any iterable of model inputs: an array becomes ``model(array)``, a tuple ``model(*tuple)``, a mapping
        ``model(**mapping)``.  For a language model, int32 tokens [batch, length].
      names: dotted paths of linear layers.
      sample_rows: rows of each layer's input to keep.

    Returns:
      Statistics by name.

    Raises:
      InputError: if there is no batch, if a layer is never called, or if an activation is not finite.
    """
    names = set(names)
    observed = replace_modules(model, lambda name, node: Observer(node, sample_rows) if name in names else node)
    graphdef, statistics, rest = nnx.split(inference_view(observed), _Statistic, ...)

    @jax.jit
    def step(statistics: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        running = nnx.merge(graphdef, statistics, rest)
        running(*args, **kwargs)
        return nnx.state(running, _Statistic)

    count = 0
    for batch in track(batches, "calibrating"):
        args, kwargs = as_arguments(batch)
        statistics = jax.block_until_ready(step(statistics, rest, args, kwargs))
        count += 1
    if not count:
        raise InputError("calibration: the data holds no batch")
    return _collect(nnx.merge(graphdef, statistics, rest), names)


def inference_view(model: ModelT) -> ModelT:
    """The model with dropout off and batch norms on their running averages."""
    return nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list):
        batch = np.asarray(batch)
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def _collect(observed: nnx.Module, names: set[str]) -> dict[str, Statistics]:
    found = {
        name: node
        for name, node in ((".".join(map(str, path)), node) for path, node in nnx.iter_graph(observed))
        if name in names and isinstance(node, Observer)
    }
    return {name: _statistics(name, found[name]) for name in found}


def _statistics(name: str, observer: Observer) -> Statistics:
    rows = int(observer.rows[...])
    if not rows:
        raise InputError(f"{name}: calibration never called this layer; call it, or ignore it")
    absmax = np.asarray(observer.absmax[...])
    if not np.isfinite(absmax).all():
        raise InputError(
            f"{name}: calibration met a non-finite activation in channel {int(np.argmin(np.isfinite(absmax)))}"
        )
    kept = np.asarray(observer.lots[...]) >= 0
    return Statistics(absmax, np.asarray(observer.samples[...])[kept], rows)
