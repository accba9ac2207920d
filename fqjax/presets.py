"""Schemes by name: those of this package, and those that other packages register."""

from collections.abc import Iterator

from fqjax import registry
from fqjax.methods import (
    AWQ,
    GPTQ,
    Absmax,
    Allocation,
    Compensated,
    FlattenQuant,
    IntegerScale,
    Method,
    RoundToNearest,
    SmoothQuant,
)
from fqjax.runtime.errors import InputError
from fqjax.scheme import Scheme

PAPER_INT4_SHARE = 0.4829
"""Share of the linear layers' multiply-accumulates that the FlattenQuant paper computes in INT4."""


def _searched(int4_share: float, compression: float) -> FlattenQuant:
    """Thresholds and bits looked for layer by layer, weights rounded by GPTQ."""
    return FlattenQuant(
        threshold_rule="search",
        rounding=Compensated(),
        max_expansion=1.5,
        allocation=Allocation(int4_share=int4_share, selection="budget", compression=compression),
    )


def _for_hopper(int4_share: float) -> FlattenQuant:
    """INT8 activations and a scale for every output channel, which cost a Hopper GPU nothing."""
    return FlattenQuant(
        activation_bits=8,
        weight_scales="channel",
        rounding=Compensated(),
        allocation=Allocation(int4_share=int4_share),
    )


def _grouped() -> Iterator[Scheme]:
    """W4A8 with three kinds of scales and W4A16, in groups of 128, each with three ways to come to the codes."""
    floats, weight_only = RoundToNearest(), RoundToNearest(activation_bits=16)
    every: dict[str, tuple[str, tuple[Method, Method, Method]]] = {
        "w4a8": (
            "INT4 weights with a float scale for each group of 128 channels, INT8 activations with one a token",
            (floats, GPTQ(), AWQ()),
        ),
        "w4a8-integer-scale": (
            "w4a8 with integer scales, so that all sums stay in int32 (Integer Scale)",
            (IntegerScale(weights=floats), IntegerScale(weights=GPTQ()), IntegerScale(weights=AWQ())),
        ),
        "w4a8-integer-scale-folded": (
            "w4a8 with integer scales so small that they are multiplied into the codes",
            (
                IntegerScale(weights=floats, folded=True),
                IntegerScale(weights=GPTQ(), folded=True),
                IntegerScale(weights=AWQ(), folded=True),
            ),
        ),
        "w4a16": (
            "INT4 weights with a float scale for each group of 128 channels, activations in bfloat16 (weight-only)",
            (weight_only, GPTQ(activation_bits=16), AWQ(activation_bits=16)),
        ),
    }
    for name, (summary, (nearest, gptq, awq)) in every.items():
        yield Scheme(name, f"{summary}.", nearest)
        yield Scheme(f"{name}-gptq", f"{name} with weights rounded by GPTQ.", gptq)
        yield Scheme(f"{name}-awq", f"{name} with channels scaled by their activations (AWQ).", awq)


PRESETS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", "No quantization: the reference that every other scheme is compared with.", None),
        Scheme(
            "w8a8",
            "INT8, one scale per tensor from the largest value. Breaks on models with outlier channels.",
            Absmax(),
        ),
        Scheme(
            "smoothquant",
            "INT8, one scale per tensor, ranges moved from activations to weights (SmoothQuant).",
            SmoothQuant(),
        ),
        Scheme(
            "flattenquant",
            "Large channels flattened, one scale per tensor, INT4 (W4A4) for at least 48.29 % of the linear "
            "multiply-accumulates and INT8 for the rest (FlattenQuant).",
            _searched(PAPER_INT4_SHARE, compression=2.4),
        ),
        Scheme(
            "flattenquant-w4a4",
            "flattenquant with INT4 throughout, activations too; the loss shows.",
            _searched(1.0, compression=3.6),
        ),
        Scheme(
            "flattenquant-w8a8",
            "Large channels flattened, one scale per tensor, INT8 throughout. Nearly free of loss.",
            FlattenQuant(),
        ),
        Scheme(
            "flattenquant-hopper",
            "INT4 weights for at least 48.29 % of the multiply-accumulates, INT8 activations throughout: as fast as "
            "INT4 ones on a GPU without INT4 tensor cores, and more accurate.",
            _for_hopper(PAPER_INT4_SHARE),
        ),
        Scheme("flattenquant-hopper-int4", "flattenquant-hopper with INT4 weights throughout.", _for_hopper(1.0)),
        *_grouped(),
    )
}


def all_schemes() -> dict[str, Scheme]:
    """The presets, and the schemes that other packages register, by name."""
    return {name: registry.lookup("schemes", name) for name in registry.names("schemes")}


def resolve_scheme(scheme: str | Scheme) -> Scheme:
    """Looks a scheme up by name; a :class:`Scheme` is returned as it is.

    Raises:
      InputError: naming the schemes, if there is none of that name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise InputError(f"scheme: expected the name of a scheme or a fqjax.Scheme, got {type(scheme).__name__}")
    return registry.lookup("schemes", scheme)


def check_data_free(scheme: Scheme, what: str = "") -> None:
    """Checks that a scheme can do without calibration data.

    Args:
      what: that asked for it, for the message.

    Raises:
      InputError: naming the schemes that can.
    """
    if scheme.calibration == "needed":
        able = ", ".join(name for name, preset in PRESETS.items() if preset.calibration == "optional")
        raise InputError(
            f"{what}scheme {scheme.name!r} needs calibration data: an iterable of model inputs; {able} do without"
        )


for _preset in PRESETS.values():
    registry.register_scheme(_preset)
