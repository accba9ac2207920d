"""Mistral 7B and what shares its architecture: every layer attends over a sliding window (arXiv 2310.06825), or none."""

import dataclasses

from fqjax.models.decoder import Decoder
from fqjax.models.decoder_config import FULL, SLIDING, DecoderConfig, Windows, read_config, read_windows
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """Sizes and constants of a Mistral model."""


class Mistral(Decoder):
    """A Mistral language model; arguments as for :class:`fqjax.models.decoder.Decoder`."""


def config_from_hf(hf: JsonMapping) -> MistralConfig:
    """Reads a Hugging Face configuration (the dictionary that ``AutoConfig`` gives).

    Raises:
      InputError: naming the entry that this family's code does not cover.
    """
    return read_config(MistralConfig, hf, **one_window(hf, hf.get("sliding_window"), "Mistral"))


def one_window(hf: JsonMapping, window: object, family: str) -> Windows:
    """Fields of the window of a family whose layers all have the same, ``window``, or none.

    Raises:
      InputError: if ``layer_types`` says otherwise, or as :func:`fqjax.models.decoder_config.read_windows` does.
    """
    windows, expected = read_windows(hf, window, first=0), FULL if window is None else SLIDING
    if set(windows["layer_types"]) != {expected}:
        # transformers passes over the entry for such an architecture, so nobody has run the layers that it asks for.
        raise InputError(
            f"config.json: layer_types of {family} with sliding_window {window}: expected {expected!r} alone"
        )
    return windows
