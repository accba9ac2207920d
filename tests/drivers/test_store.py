"""What quantization finds out, in memory and in files: values come back, and passes go on where they stopped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fqjax.core.channels import PADDING
from fqjax.core.formats.grouped import Grouped, GroupedGrid
from fqjax.core.formats.uniform import Uniform, UniformGrid
from fqjax.core.inputs import Floating, PerToken, Static
from fqjax.core.layer import LayerPlan
from fqjax.core.stored_inputs import StaticInput
from fqjax.core.table import Stored, array
from fqjax.core.transforms.diagonal import Diagonal
from fqjax.drivers.candidates import Option
from fqjax.drivers.codec import STRUCTURE_ENTRY, read_value, write_value
from fqjax.drivers.statistics import Span, Statistics
from fqjax.drivers.store import ACTIVATIONS_FOLDER, DirectoryStore, Store
from fqjax.layers.record import Figures
from fqjax.models.chain import drain
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import CannotWrite


class Gain(Stored):
    """A branch, or a finish."""

    kind = "gain_of_the_store"

    by: Array = array("out", dtype="float32")

    def __call__(self, x):
        return x * self.by


def plan():
    whole = jnp.ones(8, jnp.int32)
    grid = UniformGrid(scale=jnp.float32(0.5), pieces=whole, format=Uniform(bits=4, granularity="channel"))
    inputs = Static.of(jnp.float32(0.25), whole, 4)
    return LayerPlan(transform=Diagonal(factors=jnp.arange(1.0, 9)), inputs=inputs, grid=grid)


VALUES = {
    "none": None,
    "numbers": [True, 3, -(2**40), 0.1, 1e-300, "text", ""],
    "nested": {"a": [(1, (2.5, None)), []], 4: {8: 0.5}, ("layer", 3): "tuple for a key"},
    "empty": {},
    "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3), np.float32(2.5), np.zeros((0, 3)), np.asarray(True)],
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "bfloat16": jnp.asarray([[1.5, -2]], jnp.bfloat16),
    "statistics": Statistics(np.ones(4, np.float32), np.ones((2, 4), np.float32), 7, 9),
    "span": Span(np.ones(4, np.float32), 7, 9),
    "figures": Figures(relative_error=0.5, macs=3),
    "plan": plan(),
    "options": [Option(bits=4, error=0.1, divergence=0.2, width=256, bytes=99, plan=plan())],
    "grouped": GroupedGrid(scale=jnp.float32(1), group_scale=jnp.ones((2, 4), jnp.int32), format=Grouped(bits=4)),
    "inputs": (PerToken.of(8), Floating()),
    "stored": StaticInput(
        multiplier=jnp.ones(3),
        source=jnp.zeros(2, jnp.int32),
        part=jnp.full(2, PADDING, jnp.int32),
        scale=jnp.float32(1),
        bits=8,
    ),
    "tensor": Grouped(bits=4, group_size=32).store(
        jnp.ones((2, 256), jnp.int8), jnp.float32(1), jnp.ones((8, 2), jnp.float32)
    ),
    "branches": dataclasses.replace(plan(), branches=(Gain(by=jnp.ones(8)),) * 2, finish=Gain(by=jnp.zeros(3))),
}


def same(a, b):
    """Whether values are equal, types and dtypes included; arrays of NumPy and JAX count as the same."""
    if isinstance(a, np.ndarray | np.generic | jax.Array):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        return
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif dataclasses.is_dataclass(a) and not isinstance(a, Uniform | Grouped):
        for field in dataclasses.fields(a):
            same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


@pytest.fixture(params=["memory", "directory"])
def store(request, tmp_path):
    return Store() if request.param == "memory" else DirectoryStore(tmp_path)


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(store, name):
    assert ("value", name) not in store
    store["value", name] = VALUES[name]
    assert ("value", name) in store and ("value",) not in store
    same(store["value", name], VALUES[name])


def test_what_was_read_runs_in_the_same_programs(tmp_path):
    """As arrays of JAX with the same structure."""
    write_value(tmp_path / "value", plan())
    rounded = jax.jit(lambda plan, w: plan.round(w))
    np.testing.assert_array_equal(
        rounded(read_value(tmp_path / "value"), jnp.ones((2, 8))), rounded(plan(), jnp.ones((2, 8)))
    )
    assert rounded._cache_size() == 1


def test_a_value_may_be_replaced(store):
    store["chosen",] = {"a": 1}
    store["chosen",] = {"a": 2}
    assert store["chosen",] == {"a": 2}


def test_every_value_is_a_file_of_its_own(tmp_path):
    store = DirectoryStore(tmp_path)
    store["span", "layers.0.mlp.down_proj"] = VALUES["span"]
    store["macs",] = {"a": 1}
    assert {p.name for p in tmp_path.iterdir()} == {"span.layers.0.mlp.down_proj.safetensors", "macs.safetensors"}
    assert not load_file(tmp_path / "macs.safetensors")


class Unknown:
    pass


@dataclasses.dataclass
class NotDeclared:
    value: int = 3


@pytest.mark.parametrize("value", [Unknown(), NotDeclared(), {1, 2}, b"bytes", jnp, [(Unknown(),)]])
def test_a_value_that_cannot_be_kept_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="not a value that the store can keep"):
        DirectoryStore(tmp_path)["value",] = value
    assert not list(tmp_path.iterdir())


def rewritten(change):
    """Changes the JSON of a file's header."""

    def damage(path):
        with safe_open(path, "np") as file:
            structure, arrays = (
                json.loads(file.metadata()[STRUCTURE_ENTRY]),
                {n: file.get_tensor(n) for n in file.keys()},
            )
        save_file(arrays, path, {STRUCTURE_ENTRY: json.dumps(change(structure))})

    return damage


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("nothing of the kind"),
    "no structure": lambda path: save_file(load_file(path), path),
    "no JSON": lambda path: save_file(load_file(path), path, {STRUCTURE_ENTRY: "{"}),
    "no array": lambda path: save_file({}, path, {STRUCTURE_ENTRY: '{"array": "0"}'}),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "unknown record": rewritten(lambda s: s | {"record": "of another program"}),
    "unknown kind": rewritten(lambda _: {"stored": "of another program", "fields": {}}),
    "unknown format": rewritten(lambda _: {"format": {"kind": "of another program"}}),
    "wrong format": rewritten(lambda _: {"format": {"kind": "grouped", "bits": 4, "group_size": 48}}),
    "missing field": rewritten(lambda s: s | {"fields": {"bits": 4}}),
    "unknown structure": rewritten(lambda _: {"tuple": [{"code": "import os"}]}),
    "bare list": rewritten(lambda _: [1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_one_line(tmp_path, damage):
    store = DirectoryStore(tmp_path)
    store["span", "a"] = VALUES["span"]
    damage(tmp_path / "span.a.safetensors")
    with pytest.raises(InputError, match=rf"^{tmp_path}/span\.a\.safetensors: damaged .*and begin anew$") as caught:
        store["span", "a"]
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWrite, match="cannot be written"):
        DirectoryStore(tmp_path / "file")["macs",] = {}


class Interrupted(Exception):
    pass


def swept(store, at=None, calls=None, **settings):
    """Three blocks, the i-th of which adds 10**i, over two batches; stops when the block number ``at`` has begun."""
    calls = [] if calls is None else calls
    blocks = {f"layers.{i}": i for i in range(3)}

    def first():
        calls.append("first")
        yield from (jnp.zeros(2), jnp.ones(2))

    def step(path, block, inputs):
        calls.append(path)
        for i, x in enumerate(inputs):
            if at == block and i == 1:
                raise Interrupted
            yield x + 10**block

    return list(store.sweep("pass", blocks, first, step, "adding", **settings)), calls


def test_a_sweep_takes_outputs_to_the_next_block(store):
    outputs, calls = swept(store, keep_last=True)
    assert [x.tolist() for x in outputs] == [[111, 111], [112, 112]]
    assert sorted(calls) == ["first", "layers.0", "layers.1", "layers.2"]


def test_outputs_that_nobody_wants_are_not_kept(store):
    assert swept(store)[0] == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_sweep_goes_on_before_the_block_that_it_stopped_in(tmp_path, at):
    with pytest.raises(Interrupted):
        swept(DirectoryStore(tmp_path), at)
    folders = [p.name for p in (tmp_path / ACTIVATIONS_FOLDER).iterdir() if p.name != "unfinished"]
    assert folders == [f"pass.{at:04d}"]
    outputs, calls = swept(DirectoryStore(tmp_path), keep_last=True)
    assert [x.tolist() for x in outputs] == [[111, 111], [112, 112]]
    assert calls == [f"layers.{i}" for i in range(at, 3)]


def test_a_sweep_that_ended_is_not_gone_through_again(tmp_path):
    swept(DirectoryStore(tmp_path), keep_last=True)
    outputs, calls = swept(DirectoryStore(tmp_path), keep_last=True)
    assert [x.tolist() for x in outputs] == [[111, 111], [112, 112]] and calls == []


def test_sweeps_of_other_names_do_not_meet(tmp_path):
    store = DirectoryStore(tmp_path)
    swept(store)
    drain(store.sweep("other", {"a": 0}, lambda: [np.zeros(1)], lambda path, block, inputs: inputs, "other"))
    assert {p.name for p in (tmp_path / ACTIVATIONS_FOLDER).iterdir()} == {"pass.0003", "other.0001"}


def test_activations_may_be_trees(tmp_path):
    """As those of GPTQ are: what the float model gives, and what the quantized one does."""
    pair = (jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.float32))
    ((first, second),) = DirectoryStore(tmp_path).sweep(
        "both", {"a": 0}, lambda: [pair], lambda path, block, inputs: list(inputs), "both", keep_last=True
    )
    assert first.dtype == jnp.bfloat16 and second.dtype == jnp.float32 and first.shape == (2, 3)
