"""A model as jitted functions take it: its structure, hashed by identity, and its arrays in one tuple.

``nnx.split`` of a large model takes longer than decoding a token, and so does hashing its graph definition, which a jitted
call does every time.  Here both are done once: what was found is kept for as long as the model lives, and looked for anew
where anything in the model has been exchanged since.

    structure, leaves = flattened(model)

    @functools.partial(jax.jit, static_argnums=0)
    def run(structure, leaves, tokens):
        return structure.model(leaves)(tokens)
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fqjax.layers.record import split_to_run

_Held = jax.ShapeDtypeStruct | np.ndarray | None
"""Of an array of no elements, its shape; of one that is part of the structure, its values; None for one that is given."""


class Structure:
    """What a model is but for its arrays.  Equal only to itself; models that are alike share one."""

    def __init__(self, graphdef: nnx.GraphDef[Any], tree: Any, held: tuple[_Held, ...]):
        self._graphdef, self._tree, self._held = graphdef, tree, held

    def model(self, leaves: tuple[jax.Array, ...]) -> nnx.Module:
        """The model with these arrays, in a program that is traced."""
        given = iter(leaves)
        arrays = [next(given) if held is None else _array(held) for held in self._held]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, arrays))

    def holding(self, leaves: tuple[jax.Array, ...], below: int) -> "Flattened":
        """The same model with arrays of fewer bytes than ``below`` as part of its structure, which is this model's alone.

        A program of it has their values among its constants, and takes the host less to call.
        """
        given, held = iter(leaves), []
        for before in self._held:
            leaf = None if before is not None else next(given)
            held.append(before if leaf is None else np.asarray(leaf) if leaf.nbytes < below else None)
        large = tuple(leaf for leaf in leaves if leaf.nbytes >= below)
        return Flattened(Structure(self._graphdef, self._tree, tuple(held)), large)


def _array(held: jax.ShapeDtypeStruct | np.ndarray) -> jax.Array:
    return jnp.asarray(held) if isinstance(held, np.ndarray) else jnp.zeros(held.shape, held.dtype)


class Flattened(NamedTuple):
    """A model's structure, and its arrays in the order that it takes them.

    Arrays of no elements, such as the channels of layers where nothing is flattened, are part of the structure: every array
    that a program is given takes it a microsecond.
    """

    structure: Structure
    leaves: tuple[jax.Array, ...]


def flattened(model: nnx.Module) -> Flattened:
    """The model's structure and arrays, without its records; arrays lie on automatic axes of their mesh.

    The model is not held, and neither are its arrays: what has been exchanged is free.
    """
    with _lock:
        look = _looks.get(id(model))
        found = None if look is None else look.current(model)
        if found is None:
            found, look = _look(model)
            _looks[id(model)] = look
            weakref.finalize(model, _forget, id(model), weakref.ref(look)).atexit = False
        return found


_Reference = Callable[[], object]

_lock = threading.RLock()
_looks: "dict[int, _Look]" = {}
_structures: "weakref.WeakValueDictionary[tuple[object, object, object], Structure]" = weakref.WeakValueDictionary()
"""By graph definition, tree and empty arrays, so that a model that is loaded again finds the programs of the one before."""


def _forget(key: int, look: "weakref.ref[_Look]") -> None:
    """Drops what was found, unless it has been looked for anew since."""
    with _lock:
        if _looks.get(key) is look():
            _looks.pop(key, None)


class _Node(NamedTuple):
    """A module, list, tuple or dictionary of a model as it was."""

    node: _Reference
    is_object: bool
    """Whether its values are its attributes."""
    size: int
    """How many values it has."""
    fixed: list[tuple[int, object]]
    """Places of values that are neither nodes nor variables, and these; while they live, nothing else has their identity."""
    nodes: list[tuple[int, _Reference]]
    """Places of nodes, and these."""
    variables: list[tuple[int, int, _Reference]]
    """Places of variables, their identities, and what each held."""

    def unchanged(self) -> bool:
        """Whether the node lives, and holds the same objects.  Written for speed: a large model has hundreds of nodes."""
        node = self.node()
        if node is None:
            return False
        values: list[Any] = list(vars(node).values()) if self.is_object else _values(node)
        if len(values) != self.size:
            return False
        for at, value in self.fixed:
            if values[at] is not value:
                return False
        for at, inner in self.nodes:
            if values[at] is not inner():
                return False
        for at, identity, held in self.variables:
            if id(values[at]) != identity or values[at].get_raw_value() is not held():
                return False
        return True


class _Look:
    """What was found in a model, and how to see whether it still holds."""

    def __init__(self, model: nnx.Module, structure: Structure, leaves: tuple[jax.Array, ...]):
        self._model, self._structure = weakref.ref(model), structure
        own = {id(leaf) for leaf in jax.tree.leaves(nnx.state(model))}
        # What split_to_run has moved to another mesh is nobody else's.
        self._leaves = [_reference(leaf) if id(leaf) in own else _holding(leaf) for leaf in leaves]
        self._nodes = list(_nodes(model))

    def current(self, model: nnx.Module) -> Flattened | None:
        """What was found, if this is the model, and nothing in it has been exchanged."""
        if self._model() is not model or not all(map(_Node.unchanged, self._nodes)):
            return None
        leaves = tuple([leaf() for leaf in self._leaves])
        return Flattened(self._structure, leaves)  # pyright: ignore[reportArgumentType]


def _look(model: nnx.Module) -> tuple[Flattened, _Look]:
    graphdef, state = split_to_run(model)
    leaves, tree = jax.tree.flatten(state)
    empty = tuple(None if leaf.size else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    structure = _structures.setdefault((graphdef, tree, empty), Structure(graphdef, tree, empty))
    found = Flattened(structure, tuple(leaf for leaf in leaves if leaf.size))
    return found, _Look(model, *found)


def _nodes(root: object) -> Iterator[_Node]:
    """Every node that can be reached from one, once."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        values = _values(node)
        inner = [(at, value) for at, value in enumerate(values) if _is_node(value)]
        variables = [(at, value) for at, value in enumerate(values) if isinstance(value, nnx.Variable)]
        others = {at for at, _ in (*inner, *variables)}
        yield _Node(
            _reference(node) if isinstance(node, nnx.Module) else _holding(node),
            not isinstance(node, dict | list | tuple),
            len(values),
            [(at, value) for at, value in enumerate(values) if at not in others],
            [(at, _reference(value)) for at, value in inner],
            [(at, id(variable), _reference(variable.get_raw_value())) for at, variable in variables],
        )
        waiting += [value for _, value in inner]


def _is_node(value: object) -> bool:
    return isinstance(value, nnx.Module | nnx.Pytree | list | tuple | dict)


def _values(node: object) -> list[object]:
    """What a node holds, in its own order."""
    if isinstance(node, dict):
        return list(node.values())
    return list(node) if isinstance(node, list | tuple) else list(vars(node).values())


def _reference(value: object) -> _Reference:
    """A weak reference where there can be one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return _holding(value)


def _holding(value: object) -> _Reference:
    return lambda: value
