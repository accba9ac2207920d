"""Sizes and constants of the models in :mod:`fqjax.models.decoder`, and how they are read from Hugging Face's."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypedDict, TypeVar, cast

from fqjax.models.causal_lm import eos_ids
from fqjax.models.hf_config import check_choice, check_divides, check_number, sizes, token_id
from fqjax.models.rotary import read_rope
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping
from fqjax.runtime.validation import LayerCount, PositionCount, Positive, Scalar, Size, TokenId

FULL, SLIDING = "full_attention", "sliding_attention"

ConfigT = TypeVar("ConfigT", bound="DecoderConfig")


class Windows(TypedDict):
    """The fields of a configuration that say which layers attend over a window, and over which."""

    sliding_window: int | None
    layer_types: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and constants, named as in Hugging Face configurations; a family adds what it fixes in its architecture.

    Attributes:
      rope_scaling: the entries that :func:`fqjax.models.rotary.read_rope` returns, as sorted pairs.
      attention_bias: whether all four projections of attention have biases.
      sliding_window: how many tokens the queries of a sliding layer see, their own among them.
      layer_types: ``FULL`` or ``SLIDING`` for each layer; empty where all see everything.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: LayerCount
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: PositionCount
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: tuple[tuple[str, Scalar], ...] = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Size | None = None
    layer_types: tuple[str, ...] = ()
    tie_word_embeddings: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: tuple[TokenId, ...] = ()

    qk_norm: ClassVar[bool] = False
    """Whether each head's queries and keys pass through a norm."""

    def __post_init__(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers")

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.attention_bias

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model was made for, with what its rotary scaling stretches it to."""
        scaling = dict(self.rope_scaling)
        factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
        # Llama 3 counts the factor in max_position_embeddings; the others may or may not.
        stretched = 0.0 if scaling.get("rope_type") == "llama3" else _number(original, self.max_position_embeddings)
        return max(self.max_position_embeddings, math.floor(stretched * _number(factor, 1.0)))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has a mixture of experts in place of the MLP; see :mod:`fqjax.models.experts`."""
        del layer
        return False

    def mlps(self, layer: int) -> dict[str, int]:
        """The intermediate size of every MLP of a layer, by its dotted path there."""
        del layer
        return {"mlp": self.intermediate_size}

    def window(self, layer: int) -> int | None:
        """How many tokens the queries of a layer see; None for all."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == SLIDING else None


def read_config(cls: Callable[..., ConfigT], hf: JsonMapping, **own: object) -> ConfigT:
    """Reads what all families have in a Hugging Face configuration.

    Args:
      cls: the family's class.
      hf: the dictionary that ``AutoConfig`` gives.
      own: fields that the family has read itself.

    Raises:
      InputError: naming the entry that is absurd or not supported, and what was expected.
    """
    check_choice(hf, "hidden_act", ("silu",))
    heads = cast(int, hf["num_attention_heads"])
    read = sizes(
        hf, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    )  # fmt: skip
    read |= sizes({"num_key_value_heads": heads} | _given(hf, "num_key_value_heads"), "num_key_value_heads")
    check_divides(read, "num_key_value_heads", "num_attention_heads")
    if hf.get("head_dim") is None:
        check_divides(read, "num_attention_heads", "hidden_size")
    read |= sizes({"head_dim": read["hidden_size"] // heads} | _given(hf, "head_dim"), "head_dim")
    if read["head_dim"] % 2:
        raise InputError(f"config.json: head_dim {read['head_dim']}: expected an even number, for rotary positions")
    check_number("rms_norm_eps", hf["rms_norm_eps"])
    theta, scaling = read_rope(hf)
    return cls(
        **read,
        rms_norm_eps=hf["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=tuple(sorted(scaling.items())),
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        bos_token_id=token_id(hf, "bos_token_id"),
        eos_token_id=eos_ids(hf),
        **own,
    )


def read_windows(hf: JsonMapping, window: object, first: int) -> Windows:
    """The fields ``sliding_window`` and ``layer_types`` from a Hugging Face configuration.

    Args:
      hf: the dictionary that ``AutoConfig`` gives.
      window: the configuration's window, None where it is switched off.
      first: the layer from which on all slide, if there is a window and ``hf`` has no ``layer_types``.

    Raises:
      InputError: if ``layer_types`` has another length than there are layers, or names another kind of attention or one
        that slides without a window; or if the window is no size.
    """
    if window is not None:
        sizes({"sliding_window": window}, "sliding_window")
    layers = sizes(hf, "num_hidden_layers")["num_hidden_layers"]
    types = cast(Sequence[str], hf.get("layer_types")) or [
        SLIDING if window and i >= first else FULL for i in range(layers)
    ]
    if len(types) != layers:
        raise InputError(f"config.json: layer_types has {len(types)} entries: expected {layers}, as num_hidden_layers")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise InputError(f"config.json: layer_types: {kind!r} is not supported; expected {FULL!r} or {SLIDING!r}")
    if window is None and SLIDING in types:
        raise InputError(f"config.json: layer_types has {SLIDING!r}: expected sliding_window to be set and in use")
    return {"sliding_window": cast(int | None, window), "layer_types": tuple(types)}


def _number(value: Scalar, otherwise: float) -> float:
    """A number that may be absent."""
    return float(value) if isinstance(value, int | float) else otherwise


def _given(hf: JsonMapping, name: str) -> dict[str, object]:
    return {name: hf[name]} if hf.get(name) is not None else {}
