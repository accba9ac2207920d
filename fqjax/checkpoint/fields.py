"""Checks of a configuration's counts, before anything is built that is as large as they say."""

from typing import Protocol

from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonObject
from fqjax.runtime.validation import MAX_LAYERS


class ModelConfig(Protocol):
    """A family's configuration, as far as it is the same in all of them."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None for none."""
        ...

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ...


MAX_LAYERS_ALONE, MAX_EXPERTS_ALONE = 512, 2**14
"""Layers, and experts of all layers together, of a configuration without weights: more than any of the largest models has."""


def check_depth(where: str, config: object, arrays: int | None) -> None:
    """Refuses a configuration with more layers than there are arrays to fill them, before a model of that depth is built.

    Args:
      where: the file, for the message.
      config: the configuration.
      arrays: of the checkpoint; None where there are none yet.

    Raises:
      InputError: naming both numbers.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if arrays is None and layers > MAX_LAYERS_ALONE:
        raise InputError(f"{where}: num_hidden_layers {layers}: expected {MAX_LAYERS_ALONE} at most without weights")
    experts = getattr(config, "num_experts", 1)
    if arrays is None and layers * experts > MAX_EXPERTS_ALONE:
        raise InputError(
            f"{where}: num_experts {experts} in {layers} layers: expected {MAX_EXPERTS_ALONE} in all at most without weights"
        )
    if arrays is not None and layers > arrays:
        raise InputError(f"{where}: num_hidden_layers {layers}: expected fewer, as the checkpoint has {arrays} arrays")


def check_counts(where: str, content: JsonObject | list[object]) -> None:
    """Refuses a count of layers or labels, however deep inside, so large that reading it would take for ever.

    Raises:
      InputError: naming the entry.
    """
    entries = content.items() if isinstance(content, dict) else ((None, item) for item in content)
    for name, value in entries:
        if isinstance(value, dict | list):
            check_counts(where, value)
        elif isinstance(value, int | float) and name is not None and ("layer" in name or name == "num_labels"):
            if not abs(value) <= MAX_LAYERS:
                raise InputError(f"{where}: {name} {value!r:.60}: expected {MAX_LAYERS} at most")
