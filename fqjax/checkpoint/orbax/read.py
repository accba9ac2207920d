"""Loading models, and checking that the arrays are those that the manifest describes.

Loading builds the quantized model from the manifest alone: no float model is made on the way.  Orbax casts silently when
it is asked for another dtype than it stored, so stored shapes and dtypes are compared with the manifest's first.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array, Bool
from orbax.checkpoint import v1 as ocp

from fqjax.checkpoint.checksums import verify as verify_checksums
from fqjax.checkpoint.foreign import foreign
from fqjax.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    abstract_architecture,
    abstract_head,
    abstract_layers,
    current,
    read_manifest,
    read_stored_manifest,
)
from fqjax.checkpoint.tree import (
    Leaf,
    named_leaves,
    nest,
    split_storable,
    unnest,
    with_leaves,
    with_random_state,
)
from fqjax.core.table import Sizes, Stored
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.modules import check_module
from fqjax.layers.record import shape_of
from fqjax.layers.stacked import quantized_layers, stacked
from fqjax.layers.surgery import find_linears, replace_modules
from fqjax.runtime.arguments import check_flag, check_path, shown
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import reason
from fqjax.runtime.quiet import contained, forget

ReadT = TypeVar("ReadT")

Place = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding]
"""Where arrays go: one sharding for all, or a function of dotted name and shape."""


def load(
    path: str | Path, model: nnx.Module | None = None, *, sharding: Place | None = None, verify: bool = True
) -> Any:
    """Loads what :func:`fqjax.save` wrote.

    Args:
      path: the directory.
      model: for a model that is not one of fqjax's own, a module of the same class and sizes, before quantization; its
        arrays are not used and may be abstract (``nnx.eval_shape``).
      sharding: where arrays go, a sharding or a function of dotted name and shape; by default the default device.
      verify: whether to compare the arrays and the manifest with the checksums saved with them, which takes about half a
        second for each GB; a checkpoint of an early version has none.

    Returns:
      The model, ready to call.

    Raises:
      InputError: naming the file, layer or array at fault: not a checkpoint, a newer format version, an array that is
        missing, of another shape or dtype than the manifest says, or not what was saved; codes that could overflow.
    """
    directory = Path(os.path.realpath(check_path("path", path)))
    check_flag("verify", verify)
    if sharding is not None and not isinstance(sharding, Sharding) and not callable(sharding):
        raise InputError(f"sharding {shown(sharding)}: expected a jax.sharding.Sharding, or a function that gives one")
    if model is not None:
        check_module(model)
    if not directory.is_dir():
        raise InputError(f"{path}: {foreign(directory) or 'no such directory'}")
    written = read_stored_manifest(directory)
    manifest = current(written, directory)
    layers = abstract_layers(manifest, directory)
    found = _stored_metadata(directory)
    skeleton, head = _skeleton(manifest, directory, len(found), layers, model)
    graphdef, stored, rest = split_storable(skeleton)
    rest = with_random_state(rest)
    wanted = named_leaves(stored)
    full = {name: leaf for name, leaf in wanted.items() if leaf.size}
    _check_metadata(directory, found, full, _Told(layers, model))
    arrays = _load_arrays(directory, full, sharding)
    if verify:
        verify_checksums(written, arrays, directory, MANIFEST_FILE)
    empty = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if not leaf.size}
    loaded = nnx.merge(graphdef, with_leaves(stored, arrays | empty), rest)
    arrays.clear()  # Of experts, the model holds others in a moment.
    for name, layer in quantized_layers(loaded).items():
        _check_layer(f"{directory}: layer {name!r}", layer)
    for name in head:
        scale = getattr(loaded, name).scale.get_value()
        if not bool(jnp.all((scale > 0) & jnp.isfinite(scale))):
            raise InputError(f"{directory}: {name!r} has a scale that is not above 0; the checkpoint is damaged")
    return stacked(loaded, in_place=True)


def load_abstract(directory: Path) -> nnx.Module:
    """The model of a checkpoint with shapes in place of arrays; of the files only the manifest is looked at.

    Raises:
      InputError: as :func:`load` does.
    """
    manifest = read_manifest(directory)
    layers = abstract_layers(manifest, directory)
    return _skeleton(manifest, directory, sys.maxsize, layers, None)[0]


def _skeleton(
    manifest: Manifest, directory: Path, arrays: int, layers: dict[str, QuantizedLinear], model: nnx.Module | None
) -> tuple[nnx.Module, dict[str, nnx.Module]]:
    """The abstract model, and its head if that is in INT8."""
    skeleton = abstract_architecture(manifest, directory, arrays) if model is None else model
    unknown = set(layers) - set(find_linears(skeleton))
    if unknown:
        raise InputError(f"{directory / MANIFEST_FILE}: the model has no linear layer {sorted(unknown)[0]!r}")
    head = abstract_head(manifest, directory, skeleton)
    return replace_modules(skeleton, layers | head), head


def _check_layer(where: str, layer: QuantizedLinear) -> None:
    weight, quantizer, figures = layer.weight.get_value(), layer.input.get_value(), layer.figures
    besides = [v.get_value() for v in (layer.transform, *layer.branches, layer.finish) if v is not None]
    if not bool(_are_sound((weight, quantizer, *besides), layer.sizes)):
        raise InputError(f"{where} has a scale that is not above 0 or an index out of range; the checkpoint is damaged")
    measured = {
        "an accumulator bound": (weight.bound(quantizer.qmax), figures.accumulator_bound),
        "flattened channels": (quantizer.flattened(), figures.flattened),
    }
    for what, (found, expected) in measured.items():
        if found != expected:
            raise InputError(
                f"{where} has {what} of {found}, {MANIFEST_FILE} says {expected}; the checkpoint is damaged"
            )


@functools.partial(jax.jit, static_argnums=1)
def _are_sound(parts: tuple[Stored, ...], sizes: Sizes) -> Bool[Array, ""]:
    """Whether all parts of a layer keep the invariants that their tables declare."""
    return jnp.all(jnp.stack([part.is_sound(sizes) for part in parts]))


def _load_arrays(
    directory: Path, full: dict[tuple[str, ...], Leaf], sharding: Place | None
) -> dict[tuple[str, ...], jax.Array]:
    place = sharding or SingleDeviceSharding(jax.devices()[0])
    template = {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=place if isinstance(place, Sharding) else place(".".join(name), shape_of(leaf)),
        )
        for name, leaf in full.items()
    }
    return _of_orbax(
        lambda: unnest(ocp.load(str(directory), nest(template))), f"{directory}: the arrays cannot be read"
    )


def _stored_metadata(directory: Path) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the stored arrays, by path."""

    def read() -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]:
        tree = ocp.metadata(str(directory)).metadata
        if not isinstance(tree, dict):
            raise ValueError("its metadata does not name the arrays")
        return {name: (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for name, leaf in unnest(tree).items()}

    return _of_orbax(read, f"{directory}: no readable Orbax checkpoint")


def _of_orbax(call: Callable[[], ReadT], message: str) -> ReadT:
    """What a call of Orbax reads.

    Raises:
      InputError: the message, with the reason, if it fails; nothing of the call is left then.
    """
    failure = ""
    with contained() as settle:
        try:
            return call()
        except Exception as error:
            # Orbax and TensorStore raise many kinds; all mean that the files do not hold what was saved.
            failure = reason(error)
            forget(error)
        settle()
    raise InputError(f"{message} ({failure})")


class _Told(NamedTuple):
    """Who says which arrays there are: the model that was passed, and the manifest of quantized layers, or of all."""

    layers: Mapping[str, QuantizedLinear]
    model: nnx.Module | None

    def by(self, name: str) -> str:
        """Who says so of an array, by its dotted path, with the verb."""
        described = self.model is None or any(name.startswith(f"{layer}.") for layer in self.layers)
        return f"{MANIFEST_FILE} says" if described else "the model that was passed has"


def _check_metadata(
    directory: Path,
    found: dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]],
    wanted: dict[tuple[str, ...], Leaf],
    told: _Told,
) -> None:
    for name, leaf in wanted.items():
        text = ".".join(name)
        if name not in found:
            raise InputError(
                f"{directory}: array {text} is missing; {told.by(text)} {jnp.dtype(leaf.dtype).name} {leaf.shape}"
            )
        shape, dtype = found[name]
        if (shape, dtype) != (leaf.shape, leaf.dtype):
            raise InputError(
                f"{directory}: array {text} is stored as {dtype.name} {shape}, "
                f"{told.by(text)} {jnp.dtype(leaf.dtype).name} {leaf.shape}"
            )
    for name in found:
        if name not in wanted:
            text = ".".join(name)
            raise InputError(f"{directory}: array {text} is stored, but {told.by(text)} none of that name")
