"""What one architecture of Hugging Face consists of, and all of them by name, those of other packages too."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fqjax.models.causal_lm import CausalLM
from fqjax.registry import add, lookup, names
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import JsonMapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture is built and read.

    Attributes:
      architecture: the name that Hugging Face configurations give under "architectures".
      model_type: the name that Hugging Face configurations give under "model_type".
      model: the model's class; called as ``model(config, dtype=..., rngs=...)``.
      config: the configuration's class, a frozen dataclass of JSON values with the members of
        :class:`fqjax.models.causal_lm.TextConfig`.
      config_from_hf: from a Hugging Face configuration to ``config``.
      prefixes: what checkpoints put before the names of all tensors but the head's; the first is written, and others that a
        checkpoint has are found by its embedding.
      fused: modules of a block that are several in the checkpoint, concatenated along the output axis, or that have another
        name there; ``*`` stands for a number.
      renamed: further names of such modules that some checkpoints have.
      stacked: modules that in some checkpoints are a part of one tensor, along its first axis, with that tensor's name; ``*``
        stands for the number of the part.  Others that such checkpoints name otherwise.
      config_to_hf: from ``config`` to the entries of config.json that :mod:`fqjax.models.to_hf` would not write, or would
        write otherwise; an entry that is None there is left out.
    """

    architecture: str
    model_type: str
    model: Callable[..., CausalLM]
    config: type[Any]
    config_from_hf: Callable[[JsonMapping], Any]
    prefixes: tuple[str, ...]
    fused: dict[str, tuple[str, ...]]
    renamed: dict[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    stacked: dict[str, str] = dataclasses.field(default_factory=dict)
    config_to_hf: Callable[[Any], JsonMapping] | None = None


def register_family(family: Family) -> None:
    """Make an architecture known by its name, so that checkpoints of it can be read in this process.

    An entry point in ``fqjax.families`` that names the family, or a module that calls this, does so in every process.

    Raises:
      InputError: if it is no family, or another one has the name already.
    """
    if not isinstance(family, Family):
        raise InputError(f"family: expected a fqjax.models.Family, got {type(family).__name__}")
    add("families", family.architecture, family)


class Families(Mapping[str, Family]):
    """Families by architecture: this package's, and those of others, which are imported when a name is not known yet."""

    def __getitem__(self, name: str) -> Family:
        try:
            return lookup("families", name)
        except InputError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(names("families"))

    def __len__(self) -> int:
        return len(names("families"))
