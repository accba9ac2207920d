"""Containers in which no module can be replaced, such as tuples, exchanged for dictionaries for as long as that takes."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
from flax import nnx

Path = tuple[object, ...]
Nodes = Mapping[Path, object]


class Thawed(NamedTuple):
    """A container that a dictionary stands for.

    Attributes:
      path: in the model.
      keys: of its parts in the dictionary, in their order: the rest of their dotted paths.
      rebuilt: makes the container of its parts.
    """

    path: Path
    keys: tuple[str, ...]
    rebuilt: Callable[[Iterable[object]], object]


def thaw(model: nnx.Module) -> list[Thawed]:
    """Puts a dictionary in the place of every container that holds modules and does not let them be replaced.

    The modules keep their dotted paths.  :func:`freeze` puts the containers back.
    """
    nodes: dict[Path, object] = dict(nnx.iter_graph(model))
    thawed = []
    for path in _outermost_frozen(nodes):
        parts, structure = jax.tree_util.tree_flatten_with_path(nodes[path], is_leaf=_is_part)
        keys = tuple(".".join(str(_key(key)) for key in place) for place, _ in parts)
        _put(nodes, path, dict(zip(keys, (part for _, part in parts), strict=True)))
        thawed.append(Thawed(path, keys, structure.unflatten))
    return thawed


def freeze(model: nnx.Module, thawed: list[Thawed]) -> None:
    """Puts containers that :func:`thaw` took away back around what is in the dictionaries now."""
    nodes: dict[Path, object] = dict(nnx.iter_graph(model)) if thawed else {}
    for path, keys, rebuilt in thawed:
        held = nodes[path]
        assert isinstance(held, dict)
        _put(nodes, path, rebuilt([held[key] for key in keys]))


def _outermost_frozen(nodes: Nodes) -> list[Path]:
    """Paths of containers that hold modules, and of which only the whole can be replaced."""
    around = {path[:i] for path, node in nodes.items() if isinstance(node, nnx.Module) for i in range(len(path))}
    frozen = {path for path in around if path in nodes and not isinstance(nodes[path], nnx.Pytree | list | dict)}
    return [path for path in frozen if not any(path[:i] in frozen for i in range(len(path)))]


def _is_part(node: object) -> bool:
    return isinstance(node, nnx.Pytree | nnx.Variable)


def _key(key: object) -> object:
    """The name that Flax has for a place in a container."""
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))


def _put(nodes: Nodes, path: Path, value: object) -> None:
    parent, key = nodes[path[:-1]], path[-1]
    if isinstance(parent, list | dict | nnx.List | nnx.Dict):
        parent[key] = nnx.data(value) if isinstance(parent, nnx.Pytree) else value  # pyright: ignore
    else:
        setattr(parent, str(key), nnx.data(value))
