"""Cases and schemes that the benchmark of whole models times, and how the command line writes them."""

import dataclasses
from typing import Literal

import jax

from fqjax.presets import resolve_scheme
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme

BASELINE_SCHEME = "bf16"
"""The scheme that the others are compared with."""
Phase = Literal["prefill", "decode"]
INT8_HEAD_SUFFIX, INT8_CACHE_SUFFIX = "+int8-head", "+int8-cache"
"""Ends of the name of a scheme where the output head, or the keys and values, are INT8 too."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A case that is timed: so many sequences of so many tokens; with "decode", so many are in the cache."""

    phase: Phase
    batch: int
    length: int


GPU_CASES = (
    *(Case("prefill", *shape) for shape in ((1, 2048), (4, 2048), (1, 8192))),
    *(Case("decode", batch, length) for length in (512, 4096) for batch in (1, 16, 64)),
)
CPU_CASES = (Case("prefill", 1, 128), Case("decode", 1, 128), Case("decode", 4, 128))
"""Cases that are timed where there is no GPU."""
SCHEMES = (
    "bf16",
    "flattenquant-w8a8",
    "flattenquant-hopper",
    "flattenquant-hopper-int4",
    "flattenquant",
    "w4a8",
    "w4a8-integer-scale",
    "w4a8-integer-scale-folded",
    "w4a16",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A scheme as it is measured: its output head may be INT8 (``scheme.head``), and so may the cache."""

    scheme: Scheme
    kv_cache: Literal["int8"] | None = None

    @property
    def name(self) -> str:
        return (
            self.scheme.name
            + INT8_HEAD_SUFFIX * (self.scheme.head == "int8")
            + INT8_CACHE_SUFFIX * (self.kv_cache is not None)
        )


def parse_variant(text: str) -> Variant:
    """A preset's name, which ``+int8-head`` and ``+int8-cache`` may follow.

    Raises:
      InputError: if there is no preset of that name, or something else follows.
    """
    name, *options = text.split("+")
    for option in options:
        if f"+{option}" not in (INT8_HEAD_SUFFIX, INT8_CACHE_SUFFIX):
            raise InputError(f"scheme {text}: {option!r} follows; expected {INT8_HEAD_SUFFIX} or {INT8_CACHE_SUFFIX}")
    scheme = resolve_scheme(name)
    if INT8_HEAD_SUFFIX[1:] in options:
        scheme = dataclasses.replace(scheme, head="int8")
    return Variant(scheme, "int8" if INT8_CACHE_SUFFIX[1:] in options else None)


def default_cases() -> tuple[Case, ...]:
    """:data:`GPU_CASES` on a GPU, :data:`CPU_CASES` elsewhere."""
    return GPU_CASES if jax.default_backend() == "gpu" else CPU_CASES


def parse_case(phase: Phase, text: str) -> Case:
    """``"4x2048"`` to so many sequences of so many tokens.

    Raises:
      InputError: if it is not two positive numbers.
    """
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise InputError(f"--{phase} {text}: expected sequences x tokens, such as 4x2048")
    return Case(phase, int(batch), int(length))
