"""Damage to an fqjax checkpoint: flipped bits, arrays or manifests of another one, entries of the wrong type."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import nnx

import fqjax
from fqjax.checkpoint.calibration_record import CalibrationRecord, read_calibration_record
from fqjax.checkpoint.checksums import array_checksum
from fqjax.checkpoint.orbax.read import load
from fqjax.checkpoint.orbax.write import save
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.checkpoint.tree import named_leaves, split_storable
from fqjax.demo.run import CHECKPOINT
from fqjax.runtime.errors import InputError
from tests.models import variants

LAYER = "layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small quantized model, and where it is saved; tests take copies."""
    folder = tmp_path_factory.mktemp("original")
    variants.write_checkpoint(folder / "hf", variants.VARIANTS["llama-grouped"])
    batches = [np.random.default_rng(0).integers(3, 64, (4, 32)).astype(np.int32)]
    model, _ = fqjax.quantize(fqjax.load_hf(folder / "hf")[0], "w8a8", batches)
    save(folder / "out", model)
    return model, folder / "out"


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original[1], tmp_path / "out")


def refused(directory, *parts):
    with pytest.raises(InputError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message and str(directory) in message
    assert all(part in message for part in parts), message


def edit(directory, change):
    path = directory / "fqjax.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def save_changed(original, directory, **fields):
    """Saves the model with fields of one layer's weight changed, under the original's manifest."""
    _, path = original
    changed = load(path)
    layer = changed.layers[0].mlp.down_proj
    weight = layer.weight.get_value()
    parts = {name: change(getattr(weight, name)) for name, change in fields.items()}
    layer.weight.set_value(dataclasses.replace(weight, **parts))
    save(directory, changed)
    shutil.copy(path / "fqjax.json", directory / "fqjax.json")


def test_a_checksum_is_that_of_the_bytes_in_c_order_and_little_endian():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = f"{zlib.crc32(values.tobytes()):08x}"
    assert array_checksum(values) == array_checksum(jnp.asarray(values)) == expected
    assert array_checksum(np.asfortranarray(values)) == array_checksum(values.astype(">f4")) == expected
    assert array_checksum(values.T) != expected
    assert array_checksum(jnp.float32(3)) == f"{zlib.crc32(np.float32(3).tobytes()):08x}"
    half = jnp.asarray(values, jnp.bfloat16)
    assert array_checksum(half) == f"{zlib.crc32(np.asarray(half).view(np.uint16).tobytes()):08x}"


def test_every_array_has_a_checksum(original):
    model, path = original
    sums = json.loads((path / "fqjax.json").read_text())["checksums"]
    leaves = {name: leaf for name, leaf in named_leaves(split_storable(model)[1]).items() if leaf.size}
    assert sums["algorithm"] == "crc32" and set(sums["arrays"]) == {".".join(name) for name in leaves}
    assert all(sums["arrays"][".".join(name)] == array_checksum(leaf) for name, leaf in leaves.items())


TWO_PROCESSES = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from fqjax.checkpoint.checksums import checksums, verify, with_sums
from fqjax.runtime.errors import InputError
values = np.arange(8, dtype=np.float32)
mesh = jax.make_mesh((2,), ("x",))
whole, parted = (
    jax.make_array_from_callback((8,), NamedSharding(mesh, spec), lambda index: values[index]) for spec in (P(), P("x"))
)
assert not parted.is_fully_addressable
sums = checksums({("a",): whole})
assert sums == checksums({("a",): values})
verify(with_sums({}, sums), {("a",): parted}, Path(), "")  # Passed over.
try:
    print(checksums({("a",): whole, ("b", "c"): parted}))
except InputError as error:
    print(error)
"""


def test_arrays_of_which_other_processes_hold_a_part_are_refused():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    commands = ([sys.executable, "-c", TWO_PROCESSES, address, str(i)] for i in range(2))
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(subprocess.Popen(command, stdout=-1, stderr=-1, text=True)) for command in commands]
        results = [(*process.communicate(timeout=300), process.returncode) for process in both]
    for out, err, code in results:
        assert code == 0, err
        assert out == "array b.c: other processes hold a part of it; expected a model that this process holds whole\n"


def test_what_was_saved_without_checksums_is_loaded(saved, original):
    edit(saved, lambda m: m.pop("checksums"))
    assert fqjax.report_of(load(saved)) == fqjax.report_of(original[0])


@pytest.mark.parametrize("field", ["codes", "scale"])
def test_a_value_that_changed(original, tmp_path, field):
    # The sign of a code leaves every other check content, and so does a scale.
    save_changed(original, tmp_path / "out", **{field: lambda values: values.at[(0,) * values.ndim].multiply(-1)})
    part = "is not what was saved, by its checksum; the checkpoint is damaged"
    refused(tmp_path / "out", f"array {LAYER}.weight.{field} {part}")


def test_verification_can_be_left_out(original, tmp_path):
    save_changed(original, tmp_path / "out", codes=lambda codes: codes.at[0, 0].multiply(-1))
    refused(tmp_path / "out", f"array {LAYER}.weight.codes is not what was saved")
    found = named_leaves(nnx.state(load(tmp_path / "out", verify=False)))
    for name, leaf in named_leaves(nnx.state(original[0])).items():
        changed = np.asarray(found[name] != leaf)
        if ".".join(name) == f"{LAYER}.weight.codes":
            assert changed[0, 0] and changed.sum() == 1
        else:
            assert not changed.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_is_none_is_found_without_checksums(original, tmp_path, value):
    save_changed(original, tmp_path / "out", scale=lambda scale: jnp.full_like(scale, value))
    edit(tmp_path / "out", lambda m: m.pop("checksums"))
    refused(tmp_path / "out", f"layer '{LAYER}' has a scale that is not above 0")


def test_arrays_of_another_checkpoint(original, tmp_path, saved):
    other = load(original[1])
    other.norm.scale[...] *= 2
    save(tmp_path / "other", other)
    shutil.rmtree(saved / "state")
    shutil.copytree(tmp_path / "other" / "state", saved / "state")
    refused(saved, "is not what was saved, by its checksum")
    shutil.copy(tmp_path / "other" / "fqjax.json", saved / "fqjax.json")
    load(saved)


def test_flipped_bits_anywhere_in_the_arrays_files(original, saved):
    expected = named_leaves(nnx.state(original[0]))
    files = sorted(path for path in (saved / "state").rglob("*") if path.is_file())
    rng, refusals = np.random.default_rng(0), []
    for path in files:
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 2 + len(content) // 6000):
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :])
            try:
                found = named_leaves(nnx.state(load(saved)))
                assert all(np.array_equal(found[name], leaf) for name, leaf in expected.items())
            except InputError as error:
                assert "\n" not in str(error)
                refusals.append(str(error))
        path.write_bytes(content)
    load(saved)
    assert len(refusals) >= 5


@pytest.fixture(scope="module")
def furnished(original, tmp_path_factory):
    """The same model, saved with a tokenizer and with what calibration found."""
    record = CalibrationRecord({LAYER: np.arange(48, dtype=np.float32)}, {LAYER: {8: 0.5}})
    report = fqjax.report_of(original[0], record=record)
    path = tmp_path_factory.mktemp("furnished") / "out"
    save(path, original[0], tokenizer=load_tokenizer(CHECKPOINT), report=report)
    return path


def flipped(path, rng, count):
    """Flips one bit of a file at a time, as often as is asked for, and puts the file right at the end."""
    content = path.read_bytes()
    for at in rng.integers(0, len(content), count):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.integers(8))]) + content[at + 1 :])
        yield
    path.write_bytes(content)


def test_flipped_bits_in_tokenizer_and_calibration_record_are_found(furnished, tmp_path):
    saved, rng = shutil.copytree(furnished, tmp_path / "out"), np.random.default_rng(0)
    for path in (*(saved / "tokenizer").iterdir(), saved / "calibration.safetensors"):
        read = read_calibration_record if path.suffix == ".safetensors" else load_tokenizer
        for _ in flipped(path, rng, 12):
            with pytest.raises(InputError, match=path.name) as caught:
                read(saved)
            assert "\n" not in str(caught.value)
    assert load_tokenizer(saved).get_vocab() and read_calibration_record(saved).costs == {LAYER: {8: 0.5}}


def test_flipped_bits_beside_the_arrays_change_nothing_or_are_found(furnished, original, tmp_path):
    saved, rng = shutil.copytree(furnished, tmp_path / "out"), np.random.default_rng(1)
    expected, vocabulary = named_leaves(nnx.state(original[0])), load_tokenizer(furnished).get_vocab()
    for path in (path for path in saved.iterdir() if path.is_file() and path.stat().st_size):
        for _ in flipped(path, rng, 6):
            try:
                found = named_leaves(nnx.state(load(saved)))
                assert all(np.array_equal(found[name], leaf) for name, leaf in expected.items())
                assert load_tokenizer(saved).get_vocab() == vocabulary
                assert read_calibration_record(saved).costs == {LAYER: {8: 0.5}}
            except InputError as error:
                assert "\n" not in str(error)


def test_a_file_of_the_tokenizer_that_is_gone(furnished, tmp_path):
    saved = shutil.copytree(furnished, tmp_path / "out")
    (saved / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="tokenizer_config.json: cannot be read"):
        load_tokenizer(saved)


def test_what_was_saved_without_checksums_of_files_is_read(furnished, tmp_path):
    saved = shutil.copytree(furnished, tmp_path / "out")
    edit(saved, lambda m: m["checksums"].pop("files"))
    path = saved / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "edited"}))
    load(saved), load_tokenizer(saved), read_calibration_record(saved)


def test_all_files_have_the_same_permissions(furnished):
    modes = {path.stat().st_mode for path in furnished.rglob("*") if path.is_file()}
    assert len(modes) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_files_of_arrays_that_are_missing(saved, count):
    files = sorted(path for path in (saved / "state").rglob("*") if path.is_file() and path.parent.name == "d")
    for path in files[:count]:
        path.unlink()
    refused(saved)


CHECKSUMS = [
    (lambda c: c.update(algorithm="md5"), "algorithm 'md5': expected 'crc32'"),
    (lambda c: c.pop("algorithm"), "algorithm None"),
    (lambda c: c.update(arrays=[]), "arrays []: expected an object"),
    (lambda c: c["arrays"].pop(f"{LAYER}.weight.codes"), f"none of array {LAYER}.weight.codes"),
    (lambda c: c["arrays"].update({f"{LAYER}.weight.codes": 3}), f"array {LAYER}.weight.codes is not what was saved"),
    (lambda c: c.pop("manifest"), "not what was saved"),
]


@pytest.mark.parametrize(("change", "part"), CHECKSUMS)
def test_checksums_that_are_none(saved, change, part):
    edit(saved, lambda m: change(m["checksums"]))
    refused(saved, part)


@pytest.mark.parametrize("value", [3, "", [], False])
def test_an_entry_of_checksums_that_is_none(saved, value):
    edit(saved, lambda m: m.update(checksums=value))
    refused(saved, "checksums", "expected an object")


@pytest.mark.parametrize("name", ["manifest.ocdbt", "array_metadatas/process_0"])
def test_nothing_of_a_load_that_failed_is_left(saved, capfd, name):
    """Neither reads that go on, nor tasks that complain when they are collected."""
    path = saved / "state" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    for _ in range(3):
        refused(saved, "cannot be read" if "array" in name else "no readable Orbax checkpoint")
    left = [found for found in gc.get_objects() if type(found) in (asyncio.Task, tensorstore.Future)]
    assert not left and capfd.readouterr() == ("", "")


def layer(**changes):
    return lambda m: m["layers"][LAYER].update(changes)


def weight(**changes):
    return lambda m: m["layers"][LAYER]["weight"].update(changes)


def quantizer(**changes):
    return lambda m: m["layers"][LAYER]["input"].update(changes)


def figures(**changes):
    return lambda m: m["layers"][LAYER]["figures"].update(changes)


def config(**changes):
    return lambda m: m["architecture"]["config"].update(changes)


MANIFESTS = [
    (lambda m: m.update(format="gguf"), "not of the format 'fqjax'"),
    (lambda m: m.update(format_version="1"), "not of the format 'fqjax'"),
    (lambda m: m.update(format_version=True), "not of the format 'fqjax'"),
    (lambda m: m.update(format_version=0), "not of the format 'fqjax'"),
    (lambda m: m.update(format_version=7), "format version 7"),
    (lambda m: m.update(recipes={}), "recipes {}: expected a list"),
    (lambda m: m.update(recipes=[]), "recipe 0: expected the index of one of recipes"),
    (lambda m: m.update(layers=[]), "layers []: expected an object"),
    (lambda m: m.update(architecture="llama"), "architecture 'llama': expected an object or null"),
    (lambda m: m.update(architecture={}), "no entry 'name'"),
    (lambda m: m.update(architecture=None), "pass it as load"),
    (lambda m: m["architecture"].update(dtype="int8"), "dtype 'int8': expected 'float64' or"),
    (lambda m: m["architecture"].update(dtype=None), "dtype None"),
    (lambda m: m["architecture"].update(name=["Llama"]), "name ['Llama']: expected text"),
    (lambda m: m["architecture"].update(config=3), "config 3: expected an object"),
    (layer(weight=None), "weight None: expected an object"),
    (layer(weight={}), LAYER),
    (layer(weight={"kind": "uniform", "bits": 8, "zero_point": 1}), "zero_point"),
    (layer(weight={"kind": "uniform"}), "bits"),
    (layer(weight={"kind": "grouped", "bits": 4, "group_size": -1}), "group_size -1: expected a divisor of 128"),
    (layer(weight={"kind": "grouped", "bits": 4, "group_size": 48}), LAYER),
    (weight(kind="future"), "'future'"),
    (weight(kind=["uniform"]), LAYER),
    (weight(bits="8"), LAYER),
    (weight(bits=5), LAYER),
    (weight(granularity="row"), LAYER),
    (layer(dtypes={"scale": "float64"}), "scale is float64; expected float32"),
    (layer(dtypes={"zeros": "int8"}), "zeros: not an array of uniform"),
    (layer(dtypes={"scale": 8}), LAYER),
    (layer(input=None), "input None: expected an object"),
    (layer(input={}), LAYER),
    (quantizer(kind="future"), "'future'"),
    (quantizer(kind="static_plan"), LAYER),
    (quantizer(bits=9), "bits 9: expected a whole number from 2 to 8"),
    (quantizer(bits="8"), "bits '8': expected a whole number"),
    (quantizer(zero=1), "zero"),
    (layer(transform={"kind": "future"}), "'future'"),
    (layer(branches=[{"kind": "future"}]), "'future'"),
    (layer(branches=None), "branches None"),
    (layer(finish={"kind": "future"}), "'future'"),
    (layer(out_features=-1), "out_features -1: expected a whole number from 1"),
    (layer(out_features=10**15), "out_features 1000000000000000: expected a whole number from 1 to 16777216"),
    (layer(in_features=48.0), "in_features 48.0"),
    (layer(width=True), "width True"),
    (layer(width=8), "width 8: expected room"),
    (layer(width=129), "width 129: expected a multiple of 128"),
    (figures(flattened=-1), "flattened -1"),
    (figures(flattened=10**6), "expected room"),
    (layer(dtype="object"), "dtype 'object'"),
    (layer(recipe=-1), "recipe -1"),
    (layer(recipe=1), "recipe 1"),
    (figures(relative_error="small"), "relative_error 'small'"),
    (figures(future=1), "unknown entry 'future'"),
    (lambda m: m["layers"].update({LAYER: 3}), "expected an object"),
    (config(vocab_size=10**15), "vocab_size 1000000000000000: expected a whole number from 1 to"),
    (config(num_hidden_layers=9999), "num_hidden_layers 9999: expected fewer"),
    (config(num_attention_heads="4"), "num_attention_heads '4'"),
    (config(rms_norm_eps=float("nan")), "rms_norm_eps nan"),
    (config(rope_theta=0), "rope_theta 0: expected a finite number above 0"),
    (config(eos_token_id=["a"]), "eos_token_id ['a']: expected a list, each a whole number"),
    (config(future=1), "unknown entry 'future'"),
    (config(rope_theta=20000.0), "fqjax.json: not what was saved, by its checksum"),
    (figures(macs=1), "fqjax.json: not what was saved, by its checksum"),
]


@pytest.mark.parametrize(("change", "part"), MANIFESTS)
def test_a_manifest_that_was_changed(saved, change, part):
    edit(saved, change)
    refused(saved, part)


def test_a_manifest_whose_numbers_are_written_otherwise_is_the_same(saved, original):
    path = saved / "fqjax.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(manifest.items())), indent=3))
    found = named_leaves(nnx.state(load(saved)))
    assert all(np.array_equal(found[name], leaf) for name, leaf in named_leaves(nnx.state(original[0])).items())


@pytest.mark.thorough
def test_arrays_that_are_sharded_are_verified(original, tmp_path):
    save_changed(original, tmp_path / "changed", codes=lambda codes: codes.at[-1, -1].add(1))
    code = (
        "import sys, fqjax, jax, numpy as np\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec as P\n"
        "mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ('x', 'y'))\n"
        "def place(name, shape):\n"
        "    return NamedSharding(mesh, P('x', 'y') if name.endswith('codes') else P())\n"
        "def down(model):\n"
        "    return model.layers[0].mlp.down_proj.weight.get_value().codes\n"
        "codes = down(fqjax.load(sys.argv[1], sharding=place))\n"
        "assert len({shard.device for shard in codes.addressable_shards}) == 4\n"
        "assert codes.addressable_shards[0].data.shape == (codes.shape[0] // 2, codes.shape[1] // 2)\n"
        "np.testing.assert_array_equal(codes, down(fqjax.load(sys.argv[1])))\n"
        "try:\n"
        "    fqjax.load(sys.argv[2], sharding=place)\n"
        "except fqjax.InputError as error:\n"
        "    assert 'is not what was saved' in str(error)\n"
        "else:\n"
        "    raise AssertionError('nothing was noticed')\n"
    )
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", code, str(original[1]), str(tmp_path / "changed")], env=os.environ | flags, check=True
    )
