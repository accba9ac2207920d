"""A model's state as a nested dictionary of arrays, which is what a checkpoint stores.

A path such as ``layers / 0 / self_attn / qkv_proj / weight / codes`` is the module's dotted path, the variable's name and,
where the variable holds a quantized type, the field's name.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from fqjax.layers.record import Record

Leaf = jax.Array | jax.ShapeDtypeStruct

Tree = dict[str, Any]
"""Nested dictionaries with arrays, or with what Orbax knows of them, as leaves."""


def named_leaves(state: nnx.State) -> dict[tuple[str, ...], Leaf]:
    """Every array of an NNX state (or abstract array) by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_names(path): leaf for path, leaf in leaves}


def with_leaves(state: nnx.State, leaves: Mapping[tuple[str, ...], Leaf]) -> nnx.State:
    """The state with its arrays taken from ``leaves``."""
    old, structure = jax.tree_util.tree_flatten_with_path(state)
    return jax.tree_util.tree_unflatten(structure, [leaves[_names(path)] for path, _ in old])


def nest(leaves: Mapping[tuple[str, ...], Leaf]) -> Tree:
    """A nested dictionary from paths."""
    return unflatten_dict(leaves)


def unnest(tree: Tree) -> dict[tuple[str, ...], Any]:
    """Undoes :func:`nest`."""
    return {tuple(map(str, path)): leaf for path, leaf in flatten_dict(tree).items()}


def split_storable(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph definition, the state that is stored, and the rest: random number generators, and figures."""
    graphdef, rest, stored = nnx.split(model, (nnx.RngState, Record), ...)
    return graphdef, stored, rest


def _names(path: tuple[object, ...]) -> tuple[str, ...]:
    names = []
    for key in path:
        match key:
            case DictKey():
                names.append(str(key.key))
            case SequenceKey():
                names.append(str(key.idx))
            case GetAttrKey(name="value"):  # The variable's content, not a level of the model.
                pass
            case GetAttrKey():
                names.append(key.name)
            case _:
                raise TypeError(f"unexpected level {key!r} in a model's state")
    return tuple(names)


def with_random_state(state: nnx.State) -> nnx.State:
    """The state with random number generators where it has only their shapes, as ``nnx.eval_shape`` makes them.

    A checkpoint does not hold them: keys begin anew, each stream with one of its own, and counts at 0.
    """
    leaves, structure = jax.tree.flatten(state)
    made = [_random(leaf, i) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, made)


def _random(leaf: jax.ShapeDtypeStruct, number: int) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return jax.random.split(jax.random.key(number), leaf.shape) if leaf.shape else jax.random.key(number)
