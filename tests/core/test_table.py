"""What follows from the declarations of a stored type's arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fqjax.core.table import Sizes, Stored, array, bytes_of, static, stored_type

SIZES = Sizes(outputs=6, inputs=5, width=8)


class Sample(Stored):
    """All that a declaration can say."""

    kind = "sample_of_the_table"

    codes: Array = array("out", "stored")
    scale: Array = array("channel", dtype="float32", positive=True)
    groups: Array = array("group", "out", dtype=("float32", "int16"), positive=True, fill=1)
    source: Array = array("extra", dtype="int32", below="in")
    part: Array = array("extra", dtype="int32", natural=True, fill=9)
    size: int = static()
    per_channel: bool = static(default=True)

    @classmethod
    def axes(cls, sizes, statics):
        found = {"stored": sizes.width // 2, "group": sizes.width // statics["size"]}
        return super().axes(sizes, statics) | found | {"channel": sizes.outputs if statics["per_channel"] else None}


class Derived(Sample):
    """Has its base's arrays and one more."""

    kind = "derived_sample"

    zero: Array = array("out", dtype="int8")


def sample(**changes):
    values = {
        "codes": jnp.ones((6, 4), jnp.int8),
        "scale": jnp.ones(6),
        "groups": jnp.ones((4, 6)),
        "source": jnp.asarray([0, 4, 2], jnp.int32),
        "part": jnp.asarray([1, 2, 0], jnp.int32),
    }
    return Sample(**values | changes, size=2)


def test_types_are_found_by_kind_frozen_and_pytrees():
    assert stored_type("sample_of_the_table") is Sample and stored_type("derived_sample") is Derived
    with pytest.raises(KeyError):
        stored_type("of another program")
    assert len(jax.tree.leaves(sample())) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().codes = jnp.zeros(3)  # pyright: ignore
    assert list(Derived.table()) == [*Sample.table(), "zero"]


def test_static_fields_are_part_of_the_type_to_jax():
    double = jax.jit(lambda s: jax.tree.map(lambda leaf: 2 * leaf, s))
    assert double(sample()).statics() == {"size": 2, "per_channel": True}
    double(sample(scale=2 * jnp.ones(6)))
    assert double._cache_size() == 1
    double(dataclasses.replace(sample(), size=4))
    assert double._cache_size() == 2


def test_shapes_follow_from_sizes_and_static_fields():
    found = Sample.abstract(SIZES, size=2, per_channel=True)
    assert {name: leaf.shape for name, leaf in found.arrays().items()} == {
        "codes": (6, 4),
        "scale": (6,),
        "groups": (4, 6),
        "source": (3,),
        "part": (3,),
    }
    assert [leaf.dtype.name for leaf in found.arrays().values()] == ["int8", "float32", "float32", "int32", "int32"]
    assert Sample.abstract(SIZES, size=4, per_channel=False).scale.shape == ()
    assert jax.tree.structure(found) == jax.tree.structure(sample())


def test_dtypes_that_may_be_several_are_chosen_and_told():
    assert sample().dtypes() == {"groups": "float32"}
    found = Sample.abstract(SIZES, dtypes={"groups": "int16"}, size=2, per_channel=True)
    assert found.groups.dtype == jnp.int16 and found.dtypes() == {"groups": "int16"}


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"groups": "int32"}, "groups is int32; expected float32 or int16"),
        ({"scale": "bfloat16"}, "scale is bfloat16; expected float32"),
        ({"zeros": "int8"}, "zeros: not an array of sample_of_the_table, which has codes, scale, groups"),
        ({"size": "int8"}, "size: not an array"),
    ],
)
def test_dtypes_that_the_table_does_not_allow_are_refused(dtypes, message):
    with pytest.raises(ValueError, match=message):
        Sample.abstract(SIZES, dtypes=dtypes, size=2, per_channel=True)


def test_bytes_are_those_of_the_arrays():
    wanted = 24 + 4 * 6 + 4 * 24 + 2 * 4 * 3
    assert sample().nbytes == bytes_of(sample()) == Sample.bytes_for(SIZES, size=2, per_channel=True) == wanted
    assert Sample.abstract(SIZES, size=2, per_channel=True).nbytes == wanted
    small = Sample.abstract(SIZES, dtypes={"groups": "int16"}, size=2, per_channel=True)
    assert small.nbytes == wanted - 2 * 24 and bytes_of([None, small]) == small.nbytes


@pytest.mark.parametrize(
    ("field", "value", "sound"),
    [
        ("codes", -5, True),
        ("scale", 0.5, True),
        ("scale", 0, False),
        ("scale", -1, False),
        ("scale", math.inf, False),
        ("scale", math.nan, False),
        ("groups", 0, False),
        ("source", 4, True),
        ("source", 5, False),
        ("source", -1, False),
        ("part", 1 << 20, True),
        ("part", -1, False),
    ],
)
def test_invariants_are_checked_entry_by_entry(field, value, sound):
    one = sample()
    values = getattr(one, field)
    last = (-1,) * values.ndim
    changed = dataclasses.replace(one, **{field: values.at[last].set(value)})
    assert bool(jax.jit(lambda s: s.is_sound(SIZES))(changed)) == sound
    assert bool(one.is_sound(SIZES))


def test_padding_fills_as_declared_and_leaves_the_rest():
    one = sample()
    wider = one.padded(SIZES, 16)
    shapes = {name: leaf.shape for name, leaf in wider.arrays().items()}
    assert shapes == {
        name: leaf.shape for name, leaf in Sample.abstract(SIZES._replace(width=16), **one.statics()).arrays().items()
    }
    np.testing.assert_array_equal(wider.codes[:, :4], one.codes)
    assert not wider.codes[:, 4:].any() and (wider.groups[4:] == 1).all()
    assert wider.source.tolist() == [0, 4, 2] + [0] * 8 and wider.part.tolist() == [1, 2, 0] + [9] * 8
    assert wider.scale is one.scale and bool(wider.is_sound(SIZES._replace(width=16)))
    assert all(a is b for a, b in zip(one.arrays().values(), one.padded(SIZES, 8).arrays().values(), strict=True))


def test_arrays_are_cut_over_a_mesh_by_the_names_of_their_axes():
    found = Sample.partition_specs(SIZES, {"out": "model", "group": "data"}, size=2, per_channel=True)
    assert found == {
        "codes": PartitionSpec("model", None),
        "scale": PartitionSpec(None),
        "groups": PartitionSpec("data", "model"),
        "source": PartitionSpec(None),
        "part": PartitionSpec(None),
    }
    whole = Sample.partition_specs(SIZES, {}, size=2, per_channel=False)
    assert whole["scale"] == PartitionSpec() and all(axis is None for spec in whole.values() for axis in spec)
    for name, spec in found.items():
        assert len(spec) == getattr(sample(), name).ndim
