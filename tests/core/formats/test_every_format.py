"""What holds for every registered format: a later one needs a grid here, and is covered."""

import contextlib
import dataclasses
import itertools
import json
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fqjax.checkpoint.layer_entries import LayerEntry, abstract_layer, describe_layer
from fqjax.core.channels import flatten_codes, lay_out
from fqjax.core.formats.base import Format, Grid, QTensor, RoundedWeight
from fqjax.core.formats.grouped import Grouped, GroupedGrid
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Floating, PerToken
from fqjax.core.stored_inputs import Quantized
from fqjax.core.table import Sizes
from fqjax.drivers.codec import read_value, write_value
from fqjax.layers.linear import QuantizedLinear
from fqjax.registry import from_json, lookup, names, to_json
from fqjax.runtime.settings import defaults_of, hints_of
from fqjax.runtime.validation import validated

OUTPUTS, INPUTS, WIDTH, ROWS = 12, 200, 512, 5
TRIED = {"group_size": (32, 128)}
"""Values of fields whose types do not list them."""


def uniform_grid(form, w):
    pieces = jnp.asarray(1 + np.arange(INPUTS) % 3, jnp.int32)
    largest = jnp.max(jnp.abs(w), axis=1) / 1000
    scale = largest if form.granularity == "channel" else jnp.max(largest)
    return UniformGrid(scale=scale, pieces=pieces, format=form)


def grouped_grid(form, w):
    groups = -(-INPUTS // form.group_size)
    largest = float(jnp.max(jnp.abs(w))) / 2 ** (form.bits - 1)
    unit = largest * jnp.linspace(0.5, 1, OUTPUTS) if form.granularity == "channel" else jnp.float32(largest)
    if form.scales == "float":
        scales = np.random.default_rng(1).uniform(0.5, 1, (groups, OUTPUTS)).astype(np.float32)
        return GroupedGrid(scale=unit, group_scale=jnp.asarray(scales), format=form)
    scales = np.random.default_rng(1).integers(1, 16, (groups, OUTPUTS)).astype(np.int32)
    return GroupedGrid(scale=unit / 8, group_scale=jnp.asarray(scales), format=form)


GRIDS = {"uniform": uniform_grid, "grouped": grouped_grid}
"""A grid in a format for a weight (OUTPUTS, INPUTS), by the format's kind."""


def configs():
    """Every registered format with all values that its fields' types list, but for those that it refuses together."""
    for kind in names("formats"):
        cls = lookup("formats", kind)
        hints, defaults = hints_of(cls), defaults_of(cls)
        values = [TRIED.get(name) or typing.get_args(hint) or (defaults[name],) for name, hint in hints.items()]
        for chosen in itertools.product(*values):
            with contextlib.suppress(ValueError):
                yield cls(**dict(zip(hints, chosen, strict=True)))


FORMATS = list(configs())


def label(form):
    return "-".join(str(getattr(form, name)) for name in ("kind", *hints_of(type(form))))


every_format = pytest.mark.parametrize("form", FORMATS, ids=label)


def filled(form, outputs=OUTPUTS, width=WIDTH):
    """A tensor with random codes and small integer scales."""
    rng, sizes = np.random.default_rng(0), Sizes(outputs, width, width)

    def entries(name, leaf):
        declared = form.tensor.table()[name]
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        low, high = (1, 4) if declared.positive else (-42, 43)
        return jnp.asarray(rng.integers(low, high, leaf.shape), leaf.dtype)

    shapes = form.abstract(sizes)
    return dataclasses.replace(shapes, **{name: entries(name, leaf) for name, leaf in shapes.arrays().items()})


def numpy_codes(codes, bits):
    """Codes (out, K') as int64; of those of 4 bits, blocks of 256 have their first half in the low nibbles."""
    stored = np.asarray(codes)
    if bits == 8:
        return stored.astype(np.int64)
    blocks = stored.view(np.uint8).reshape(len(stored), -1, 128).astype(np.int64)
    nibbles = np.concatenate([blocks & 15, blocks >> 4], axis=2)
    return ((nibbles ^ 8) - 8).reshape(len(stored), -1)


def numpy_weight(tensor):
    """The weight (out, K') in float64; of integer codes and scales that kernels take, where there are such."""
    operand = tensor.operand()
    if operand is None:
        return np.asarray(tensor.dequantize(), np.float64)
    weight = numpy_codes(operand.codes, operand.decoder.bits)
    if operand.group_scale is not None:
        groups = np.asarray(operand.group_scale).T
        groups = groups.astype(np.int64) if np.issubdtype(groups.dtype, np.integer) else groups.astype(np.float64)
        weight = weight * np.repeat(groups, weight.shape[1] // groups.shape[1], axis=1)
    return weight * np.broadcast_to(np.asarray(operand.scale, np.float64), len(weight))[:, None]


def weight():
    return jnp.asarray(np.random.default_rng(2).normal(size=(OUTPUTS, INPUTS)), jnp.float32)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_every_registered_format_is_here():
    assert set(GRIDS) == set(names("formats")) and {type(form).kind for form in FORMATS} == set(GRIDS)
    assert len(FORMATS) >= 4 + 20


@every_format
def test_a_format_is_hashable_and_json(form):
    assert isinstance(form, Format) and hash(form) == hash(dataclasses.replace(form)) and form.label
    again = from_json("formats", json.loads(json.dumps(to_json(form))))
    assert again == form and type(again) is type(form)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Uniform, {"bits": 5}, "bits=5: expected 4 or 8"),
        (Uniform, {"bits": 8, "granularity": "row"}, "granularity=row: expected 'tensor' or 'channel'"),
        (Grouped, {"bits": 4, "group_size": "many"}, "group_size=many: expected a whole number"),
        (Grouped, {"bits": 4, "group_size": 48}, "group_size 48: expected a divisor of 128"),
        (Grouped, {"bits": 4, "scales": "int"}, "scales=int: expected 'float' or 'integer' or 'folded'"),
    ],
)
def test_a_format_refuses_fields_of_another_kind(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


@every_format
def test_shapes_bytes_and_padding_follow_from_the_format(form):
    tensor, width = filled(form), form.padded(INPUTS)
    assert isinstance(tensor, QTensor) and tensor.shape == (OUTPUTS, WIDTH)
    assert tensor.nbytes == form.bytes(OUTPUTS, WIDTH) == form.abstract(Sizes(OUTPUTS, INPUTS, WIDTH)).nbytes
    assert width >= INPUTS and width % form.multiple == 0 and width - INPUTS < form.multiple
    assert form.bits_per_weight(OUTPUTS, INPUTS) == 8 * form.bytes(OUTPUTS, width) / (OUTPUTS * INPUTS)


@every_format
def test_a_tensor_is_the_weight_that_its_codes_and_scales_say(form):
    tensor = filled(form)
    close(tensor.dequantize(), numpy_weight(tensor))
    assert bool(tensor.is_sound(Sizes(OUTPUTS, WIDTH, WIDTH)))


@pytest.mark.sample(6)
@pytest.mark.parametrize("rows", ["scalar", "token"])
@every_format
def test_products_are_those_of_integers(form, rows):
    rng, tensor = np.random.default_rng(3), filled(form)
    x = rng.integers(-127, 128, (ROWS, WIDTH))
    scale = rng.uniform(0.5, 1.5, ROWS if rows == "token" else ()).astype(np.float32)
    bias = rng.normal(size=OUTPUTS).astype(np.float32)
    given = Quantized(jnp.asarray(x, jnp.int8), jnp.asarray(scale))
    found = tensor.matmul(given, jnp.asarray(bias), out_dtype=jnp.float32)
    close(found, (x @ numpy_weight(tensor).T) * (scale[:, None] if scale.ndim else scale) + bias)
    assert tensor.matmul(given, out_dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("form", [form for form in FORMATS if form.takes_floating], ids=label)
def test_products_with_activations_in_floating_point(form):
    tensor, x = filled(form), np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    found = tensor.matmul(Quantized(jnp.asarray(x), jnp.float32(1)), out_dtype=jnp.float32)
    expected = x @ numpy_weight(tensor).T
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@every_format
def test_the_bound_is_one(form):
    """What the accumulator reaches for the worst activations; with float scales there is one for every group."""
    tensor = filled(form)
    operand = tensor.operand()
    if operand is None:
        pytest.skip("no integer kernel takes it")
    codes = np.abs(numpy_codes(operand.codes, operand.decoder.bits))
    integers = operand.group_scale is not None and np.issubdtype(operand.group_scale.dtype, np.integer)
    if integers:
        groups = np.asarray(operand.group_scale).T.astype(np.int64)
        codes = codes * np.repeat(groups, WIDTH // groups.shape[1], axis=1)
    elif operand.group_scale is not None:
        codes = codes.reshape(OUTPUTS, len(operand.group_scale), -1)
    worst = 127 * int(codes.sum(axis=-1).max())
    # Codes of 4 bits are multiplied as the upper halves of bytes where scales are integers.
    assert worst <= tensor.bound(127) <= worst * (16 if integers and operand.decoder.bits == 4 else 1)
    assert tensor.bound(None) == 0


@every_format
def test_padding_a_tensor_changes_no_product(form):
    tensor, wider = filled(form), WIDTH + 2 * form.multiple
    padded = tensor.padded(Sizes(OUTPUTS, WIDTH, WIDTH), wider)
    assert padded.shape == (OUTPUTS, wider) and padded.format == form
    assert jax.tree.map(jnp.shape, padded) == jax.tree.map(jnp.shape, form.abstract(Sizes(OUTPUTS, WIDTH, wider)))
    close(padded.dequantize(), np.pad(numpy_weight(tensor), ((0, 0), (0, wider - WIDTH))))


@every_format
def test_arrays_can_be_cut_over_a_mesh(form):
    shapes = form.abstract(Sizes(OUTPUTS, INPUTS, WIDTH))
    specs = form.tensor.partition_specs(Sizes(OUTPUTS, INPUTS, WIDTH), {"out": "model"}, format=form)
    for name, leaf in shapes.arrays().items():
        assert len(specs[name]) == leaf.ndim
        assert all(leaf.shape[i] == OUTPUTS for i, axis in enumerate(specs[name]) if axis == "model")


@every_format
def test_a_grid_rounds_packs_and_comes_back(form):
    w, grid = weight(), GRIDS[form.kind](form, weight())
    assert isinstance(grid, Grid)
    codes = grid.round(w)
    represented = grid.weight(codes)
    assert isinstance(represented, RoundedWeight) and represented().shape == w.shape
    close(grid.fake(w), represented())
    close(
        jnp.stack([grid.column(w[:, i], jnp.int32(i)) for i in (0, 1, INPUTS - 1)]), represented().T[jnp.r_[0, 1, -1]]
    )
    np.testing.assert_array_equal(grid.round(represented()), codes)
    x_pieces = None if grid.pieces is None else np.asarray(1 + np.arange(INPUTS) % 2)
    channels = lay_out(x_pieces, grid.pieces, INPUTS, form.multiple)
    tensor = grid.pack(codes, channels)
    assert tensor.shape == (OUTPUTS, channels.width) and bool(tensor.is_sound(Sizes(OUTPUTS, INPUTS, channels.width)))
    source, part = jnp.asarray(channels.source), jnp.asarray(channels.x_part)
    close(tensor.weight(source, part)(), represented())
    limit = 127 * (1 if x_pieces is None else x_pieces)
    x = np.random.default_rng(3).integers(-limit, limit + 1, (ROWS, INPUTS))
    flat = flatten_codes(jnp.asarray(x), source, part, 127)
    close(np.asarray(flat, np.float64) @ numpy_weight(tensor).T, x @ np.asarray(represented(), np.float64).T)


@every_format
def test_gradients_go_straight_through_the_rounding(form):
    w, grid = weight(), GRIDS[form.kind](form, weight())
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(grid.fake(w)))(w), jnp.ones_like(w))


@every_format
def test_some_rows_of_a_grid(form):
    w, grid = weight(), GRIDS[form.kind](form, weight())
    part = grid.rows(slice(2, 7), w[2:7])
    found, whole = part.weight(part.round(w[2:7]))(), grid.weight(grid.round(w))()[2:7]
    assert found.shape == (5, INPUTS)
    assert float(jnp.sum((found - w[2:7]) ** 2)) <= 1.1 * float(jnp.sum((whole - w[2:7]) ** 2))


@every_format
def test_checkpoints_describe_it(form, tmp_path):
    """The manifest's entry gives the layer's type back, and the store its arrays."""
    plan = Floating() if form.takes_floating else PerToken.of(8)
    channels = lay_out(None, None, WIDTH, form.multiple)
    layer = QuantizedLinear(filled(form), plan.stored(None, channels), dtype=None, param_dtype=jnp.bfloat16)
    entry = validated(LayerEntry, json.loads(json.dumps(describe_layer(layer, 0))), "")
    again = abstract_layer("layer", entry, layer.recipe)
    assert jax.tree.structure(again.weight.get_value()) == jax.tree.structure(layer.weight.get_value())
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(one.parts()["weight"])] for one in (again, layer)]
    assert kinds[0] == kinds[1] and again.sizes == layer.sizes and again.nbytes == layer.nbytes
    write_value(tmp_path / "tensor", layer.weight.get_value())
    read = read_value(tmp_path / "tensor")
    assert jax.tree.structure(read) == jax.tree.structure(layer.weight.get_value())
    jax.tree.map(np.testing.assert_array_equal, read, layer.weight.get_value())
