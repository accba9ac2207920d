"""Rotary positions, and how their frequencies are stretched for texts longer than those of training.

A pair of channels is turned by an angle in proportion to the position, each pair at a frequency of its own, so that the
product of a query and a key depends on their distance alone (arXiv 2104.09864).  The scalings that keep one frequency a
pair whatever the length of the text are here; "dynamic" and "longrope", whose frequencies change as the text grows, do not
fit a cache of keys that are already turned.
"""

import math
from collections.abc import Mapping
from typing import cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from fqjax.models.hf_config import check_number
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping
from fqjax.runtime.notices import say_once
from fqjax.runtime.validation import Scalar
from pallas_kernels.attention.reference import rotated

REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The supported scalings by Hugging Face's name, with the entries that each needs."""

OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}
"""Entries that a scaling takes besides."""

ORIGINAL_LENGTH = "original_max_position_embeddings"
"""Entry with the length of training texts, before scaling."""

Rotation = tuple[Float32[Array, "*batch length half"], Float32[Array, "*batch length half"]]
"""Cosines and sines of the angles at some positions."""


def rotate(x: Float[Array, "batch length heads dim"], rotation: Rotation) -> Float[Array, "batch length heads dim"]:
    """Rotary position embedding (arXiv 2104.09864), pairs taken from the two halves of a head.

    Args:
      x: queries or keys.
      rotation: of the tokens' positions, (length, dim / 2) or (batch, length, dim / 2).
    """
    cos, sin = (part[..., None, :] for part in rotation)
    return rotated(x, cos, sin)


def rotation(
    positions: Int32[Array, "*batch length"], head_dim: int, theta: float, scaling: Mapping[str, Scalar]
) -> Rotation:
    """Cosines and sines at positions, after the scaling that :func:`read_rope` found; for YaRN, times its magnitude."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    size = _yarn_magnitude(scaling) if scaling.get("rope_type") == "yarn" else 1.0
    return jnp.cos(angles) * size, jnp.sin(angles) * size


def frequencies(head_dim: int, theta: float, scaling: Mapping[str, Scalar]) -> Float32[Array, " half"]:
    """Angle per position of each pair of channels, after scaling; ``scaling`` as in :func:`rotation`."""
    inverse = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return inverse / _number(scaling, "factor")
    if kind == "llama3":
        return _llama3(inverse, scaling)
    if kind == "yarn":
        return _yarn(inverse, theta, scaling)
    return inverse


def _llama3(inverse: Float32[Array, " half"], scaling: Mapping[str, Scalar]) -> Float32[Array, " half"]:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = _number(scaling, "original_max_position_embeddings") * inverse / (2 * math.pi)
    return _blend(inverse, _number(scaling, "factor"), jnp.clip((turns - low) / (high - low), 0, 1))


def _yarn(inverse: Float32[Array, " half"], theta: float, scaling: Mapping[str, Scalar]) -> Float32[Array, " half"]:
    """YaRN (arXiv 2309.00071, section 3.2).

    Pairs that turn more than ``beta_fast`` times within the original length are kept, those that turn less than
    ``beta_slow`` times are stretched by ``factor``, and those between are interpolated by their index.
    """
    half, original = inverse.shape[0], _number(scaling, "original_max_position_embeddings")

    def index(turns: float) -> float:
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    low, high = index(_number(scaling, "beta_fast", 32)), index(_number(scaling, "beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (jnp.arange(half, dtype=jnp.float32) - low) / (high - low or 0.001)
    return _blend(inverse, _number(scaling, "factor"), 1 - jnp.clip(ramp, 0, 1))


def _blend(inverse: Float32[Array, " half"], factor: float, kept: Float32[Array, " half"]) -> Float32[Array, " half"]:
    return (1 - kept) * inverse / factor + kept * inverse


def _yarn_magnitude(scaling: Mapping[str, Scalar]) -> float:
    """Factor of queries and keys in YaRN (its section 3.4): ``attention_factor``, or what ``factor`` implies."""
    if "attention_factor" in scaling:
        return _number(scaling, "attention_factor")

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(max(_number(scaling, "factor"), 1.0)) + 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(_number(scaling, "mscale")) / magnitude(_number(scaling, "mscale_all_dim"))
    return magnitude(1.0)


def _number(scaling: Mapping[str, Scalar], name: str, default: float | None = None) -> float:
    """An entry that :func:`read_rope` has found to be a number."""
    return cast(float, scaling[name] if default is None else scaling.get(name, default))


def read_rope(hf: JsonMapping) -> tuple[float, dict[str, Scalar]]:
    """Reads theta and scaling from a Hugging Face configuration.

    ``rope_parameters`` holds both in transformers 5; before, theta stood beside ``rope_scaling``.  The length before
    scaling may stand at the top, where it counts before transformers' guess from ``max_position_embeddings``; that files do
    not contradict each other in any of this, :func:`check_rope` finds.

    Returns:
      Theta, and the scaling's entries with its name under "rope_type"; empty for no scaling.

    Raises:
      InputError: naming the entry that is missing, out of range, or of a kind that is not supported.
    """
    rope = dict(cast(Mapping[str, Scalar], hf.get("rope_parameters") or hf.get("rope_scaling") or {}))
    kind = cast(str, rope.get("rope_type", rope.get("type", "default")))
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise InputError(f"config.json: rope_parameters has entries for {nested[0]}; expected the same for all layers")
    if kind not in REQUIRED:
        raise InputError(f"config.json: rope_type {kind!r} is not supported; expected one of {', '.join(REQUIRED)}")
    part = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise InputError(f"config.json: partial_rotary_factor {part!r} is not supported; expected 1")
    theta = cast(float, rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    check_number("rope_theta", theta, above=1)
    if kind == "default" and rope.get("factor") not in (None, 1):
        raise InputError(
            f"config.json: factor {rope['factor']!r} without a rope_type that scales; expected one, or no factor"
        )
    if ORIGINAL_LENGTH in REQUIRED[kind] and hf.get(ORIGINAL_LENGTH) is not None:
        rope[ORIGINAL_LENGTH] = cast(Scalar, hf[ORIGINAL_LENGTH])
    names = (*REQUIRED[kind], *OPTIONAL.get(kind, ()))
    scaling = {key: rope[key] for key in names if rope.get(key) is not None}
    _check_scaling(kind, scaling)
    return float(theta), {"rope_type": kind, **scaling} if kind != "default" else {}


def check_rope(raw: JsonMapping) -> None:
    """Refuses a configuration, as its file has it, whose spellings of the scaling contradict each other.

    Of two values of theta that of the scaling counts, for every reader; it is said.

    Raises:
      InputError: naming the entry, and both values.
    """
    places = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if isinstance(raw.get(name), dict)}
    given = [cast(Mapping[str, object], place) for place in places.values() if place]
    for place in given:
        kinds = [place[name] for name in ("rope_type", "type") if place.get(name) is not None]
        _check_one("rope_type and type", kinds)
    _check_one(ORIGINAL_LENGTH, [p[ORIGINAL_LENGTH] for p in (raw, *given) if p.get(ORIGINAL_LENGTH) is not None])
    thetas = [place["rope_theta"] for place in (*given, raw) if place.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        say_once(f"config.json: rope_theta is {' and '.join(map(str, thetas))}; the first, of the scaling, is used")
    if len(given) == 2:
        scalings = [_scaling_alone(place) for place in given]
        for name in sorted(set().union(*scalings)):
            values = [scaling.get(name) for scaling in scalings]
            _check_one(f"{name} of rope_parameters and rope_scaling", values)


def _scaling_alone(place: Mapping[str, object]) -> dict[str, object]:
    """The entries of a scaling under today's names, without theta."""
    kind = place.get("rope_type", place.get("type", "default"))
    beside = ("rope_theta", "rope_type", "type", ORIGINAL_LENGTH)
    return {"rope_type": kind} | {key: value for key, value in place.items() if key not in beside and value is not None}


def _check_one(name: str, values: list[object]) -> None:
    if any(value != values[0] for value in values[1:]):
        raise InputError(
            f"config.json: {name}: {' and '.join(f'{value!r:.40}' for value in values)}; expected one value"
        )


def _check_scaling(kind: str, scaling: Mapping[str, Scalar]) -> None:
    for key in REQUIRED[kind]:
        if key not in scaling:
            raise InputError(f"config.json: rope_type {kind!r} needs {key!r}")
    for key, value in scaling.items():
        if key != "truncate":
            check_number(key, value)
        elif not isinstance(value, bool):
            raise InputError(f"config.json: truncate {value!r} of rope_type {kind!r}: expected true or false")
    if kind == "llama3" and _number(scaling, "low_freq_factor") >= _number(scaling, "high_freq_factor"):
        raise InputError(
            f"config.json: high_freq_factor {scaling['high_freq_factor']}: expected more than low_freq_factor "
            f"{scaling['low_freq_factor']}"
        )
    fast, slow = _number(scaling, "beta_fast", 32), _number(scaling, "beta_slow", 1)
    if fast <= slow:
        raise InputError(f"config.json: beta_fast {fast}: expected more than beta_slow {slow}")
