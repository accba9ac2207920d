"""Names of a checkpoint's tensors: which of them a parameter of the model consists of.

Programs do not agree on names.  A checkpoint of the bare trunk has no prefix, one that was wrapped has more; experts are
called by what they do or by number.  So the spelling is looked up in the files; the first of a family's is written.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flax.typing import PathParts

from fqjax.models import Family

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""Modules by which a checkpoint's prefixes are found; every family has the first."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_BLOCK = re.compile(r"layers\.\d+\.")


class Source(NamedTuple):
    """Where one parameter comes from: tensors to concatenate along their first axis, and whether to transpose.

    With ``part``, it is that part of one tensor, along its first axis.
    """

    tensors: tuple[str, ...]
    transpose: bool
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a checkpoint names its tensors.

    Attributes:
      prefix: of all names but the head's.
      head: the head's module.
      parts: modules of a block that are several in the checkpoint, or have another name there; ``*`` stands for a number.
      stacked: modules that are a part of one tensor, and others that are named otherwise beside such tensors.
    """

    prefix: str
    head: str
    parts: Mapping[str, tuple[str, ...]]
    stacked: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def embedding(self) -> str:
        """The tensor of the embedding."""
        return f"{self.prefix}{EMBEDDING}.weight"

    def source(self, path: PathParts) -> Source:
        """The tensors of a parameter, by its path in the model."""
        *modules, leaf = (str(part) for part in path)
        name = ".".join(modules)
        ending, transpose = "bias" if leaf == "bias" else "weight", leaf == "kernel"
        if name == HEAD:
            return Source((f"{self.head}.{ending}",), transpose)
        layer, inside = "", name
        if modules[0] == "layers":
            layer, inside = f"layers.{modules[1]}.", ".".join(modules[2:])
        pattern, number = _NUMBER.sub("*", inside), _NUMBER.search(inside)
        if pattern in self.stacked:
            part = None if number is None else int(number[0])
            return Source((f"{self.prefix}{layer}{self.stacked[pattern]}",), transpose, part)
        names = self.parts.get(pattern, (inside,))
        parts = [part if number is None else part.replace("*", number[0]) for part in names]
        return Source(tuple(f"{self.prefix}{layer}{part}.{ending}" for part in parts), transpose)


def written(family: Family) -> Naming:
    """The names that a family's checkpoints are written with."""
    return Naming(family.prefixes[0], HEAD, family.fused)


def found(names: Iterable[str], family: Family) -> Naming:
    """The names that a checkpoint has, by all names of its tensors; where it has none, those of :func:`written`."""
    names = list(names)
    prefix, head = _prefix(names, family), _head(names)
    modules = {_module(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    parts = dict(family.fused)
    for pattern, others in family.renamed.items():
        options = (family.fused.get(pattern, (pattern,)), *others)
        parts[pattern] = next((option for option in options if modules.issuperset(option)), options[0])
    return Naming(prefix, head, parts, family.stacked if _has_stacks(names, family) else {})


def _prefix(names: list[str], family: Family) -> str:
    """What stands before the embedding's name: one of the family's own, nothing, or what the checkpoint was wrapped in."""
    ending = f"{EMBEDDING}.weight"
    found = [name.removesuffix(ending) for name in names if name == ending or name.endswith(f".{ending}")]
    own = [prefix for prefix in (*family.prefixes, "") if prefix in found]
    return (own or found or list(family.prefixes))[0]


def _head(names: list[str]) -> str:
    """The head's module, which need not have the prefix of the others."""
    found = {name.rpartition(".")[0] for name in names}
    heads = sorted((n for n in found if n == HEAD or n.endswith(f".{HEAD}")), key=lambda name: (name.count("."), name))
    return heads[0] if heads else HEAD


def _module(name: str) -> str:
    """The module of a tensor, within its block, with ``*`` for a number."""
    return _NUMBER.sub("*", _BLOCK.sub("", name, count=1).rpartition(".")[0])


def _has_stacks(names: list[str], family: Family) -> bool:
    """Whether a checkpoint holds all experts of a layer in one tensor."""
    stacks = tuple(f".{tensor}" for module, tensor in family.stacked.items() if "*" in module)
    return any(name.endswith(stacks) for name in names) if stacks else False
