"""Files of tensors that are broken, or made to do harm: every one ends in one line that names the file, and the tensor."""

import json
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fqjax.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, TensorFiles
from fqjax.runtime.errors import InputError


def entry(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write(path, header, data=8, length=None):
    """A file of any header, as JSON or as bytes, that need not be right."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + bytes(data))


def refused(directory, *parts):
    with pytest.raises(InputError) as caught:
        TensorFiles(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert all(part in message for part in parts), message


TWICE = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)

HEADERS = {
    "not JSON": (b"{nope", 0, []),
    "not UTF-8": (b'{"\xff": 1}', 0, []),
    "a list": (b"[1, 2]", 0, ["invalid type: sequence"]),
    "nested too deeply": (b'{"a":' * 100_000, 0, ["recursion limit"]),
    "nothing in it, bytes behind": ({}, 8, ["file not fully covered"]),
    "an entry that is a number": ({"a": 3}, 8, ["integer `3`"]),
    "an entry without offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8, ["missing field `data_offsets`"]),
    "three offsets": ({"a": entry() | {"data_offsets": [0, 8, 8]}}, 8, ["invalid length 3"]),
    "negative offsets": ({"a": entry(start=-8, end=0)}, 8, ["integer `-8`"]),
    "offsets in the wrong order": ({"a": entry(start=8, end=0)}, 8, ["tensor `a`"]),
    "offsets behind the end": ({"a": entry(start=0, end=64, shape=(16,))}, 8, ["not fully covered"]),
    "huge offsets": ({"a": entry(start=2**63, end=2**63 + 8)}, 8, ["tensor `a`"]),
    "overlapping": ({"a": entry(), "b": entry(start=4, end=12)}, 12, ["`b`"]),
    "a hole": ({"a": entry(), "b": entry(start=16, end=24)}, 24, ["`b`"]),
    "bytes behind the last": ({"a": entry()}, 9, ["file not fully covered"]),
    "a shape too large": ({"a": entry(shape=(3,))}, 8, ["invalid shape"]),
    "a shape beyond 64 bits": ({"a": entry(shape=(2**62, 8))}, 8, ["overflow"]),
    "a negative shape": ({"a": entry(shape=(-2,))}, 8, ["integer `-2`"]),
    "a shape of text": ({"a": entry(shape=("2",))}, 8, ['string "2"']),
    "a shape that is not whole": ({"a": entry(shape=(2.0,))}, 8, ["floating point `2.0`"]),
    "an unknown dtype": ({"a": entry("F33")}, 8, ["`F33`"]),
    "a dtype that is a list": ({"a": entry(["F32"])}, 8, ["invalid type: sequence"]),
    "a dtype of another width": ({"a": entry("F64")}, 8, ["invalid shape, data type"]),
    "a name twice": (TWICE, 8, ["'a' is there twice"]),
    "metadata that is no text": ({"a": entry(), "__metadata__": {"x": 3}}, 8, ["expected a string"]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_is_wrong(tmp_path, case):
    header, data, parts = HEADERS[case]
    write(tmp_path / SINGLE_FILE, header, data)
    refused(tmp_path, f"{SINGLE_FILE}: ", "safetensors file", *parts)


@pytest.mark.parametrize("length", [0, 1, 1000, 99_000_000, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length(tmp_path, length):
    write(tmp_path / SINGLE_FILE, {"a": entry()}, length=length)
    refused(tmp_path, SINGLE_FILE)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 30, -9, -1])
def test_a_file_cut_short(tmp_path, keep):
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:keep])
    refused(tmp_path, f"{SINGLE_FILE}: truncated")


def test_a_file_that_is_right_is_read(tmp_path):
    write(tmp_path / SINGLE_FILE, {"a": entry(), "__metadata__": {"format": "pt"}})
    files = TensorFiles(tmp_path)
    assert files.names() == ["a"] and files.shape("a") == (2,)
    np.testing.assert_array_equal(files.read("a", jnp.bfloat16), np.zeros(2))


@pytest.mark.parametrize(("dtype", "size"), [("I8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("U16", 2)])
def test_what_is_no_float_is_found_before_it_is_read(tmp_path, dtype, size):
    write(tmp_path / SINGLE_FILE, {"a": entry(dtype, end=2 * size)}, 2 * size)
    with pytest.raises(InputError, match=f"{SINGLE_FILE}: tensor 'a' has dtype {dtype}, expected one of F32"):
        TensorFiles(tmp_path).shape("a")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([1, np.nan], np.float32), "float32"),
        (np.array([1, -np.inf], np.float16), "bfloat16"),
        (np.array([1, 1e300], np.float64), "float32"),
        (np.array([1, 3.4e38], np.float32), "bfloat16"),
        (np.array([1, 1e5], np.float32), "float16"),
    ],
)
def test_a_value_that_is_not_finite_in_the_dtype_asked_for(tmp_path, values, dtype):
    save_file({"a": values}, tmp_path / SINGLE_FILE)
    with pytest.raises(InputError, match=f"{SINGLE_FILE}: tensor 'a' holds a value that is not finite in {dtype}"):
        TensorFiles(tmp_path).read("a", dtype)


def test_a_dtype_that_lies_is_found_by_its_values(tmp_path):
    save_file({"a": np.full(2, 255, np.uint16)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes().replace(b'"U16"', b'"F16"').replace(b"\xff\x00", b"\x00\x7e")
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(InputError, match="not finite"):
        TensorFiles(tmp_path).read("a", np.float32)


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE])
def test_a_directory_in_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(tmp_path, f"{name}: a directory; expected a file")


def test_a_directory_in_place_of_a_shard(tmp_path):
    (tmp_path / "one.safetensors").mkdir()
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "one.safetensors"}}')
    refused(tmp_path, "one.safetensors: a directory; expected a file")


def test_a_pipe_in_place_of_a_file(tmp_path):
    os.mkfifo(tmp_path / SINGLE_FILE)
    refused(tmp_path, f"{SINGLE_FILE}: not a regular file")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", []),
        (b"\xff\xfe", ["utf-8"]),
        (b"[]", ["expected an object, got list"]),
        (b"[" * 100_000, ["too deeply"]),
        (b"{}", ["weight_map must map"]),
        (b'{"weight_map": []}', ["weight_map must map"]),
        (b'{"weight_map": {"a": null}}', ["weight_map must map"]),
        (b'{"weight_map": {"a": ["one.safetensors"]}}', ["weight_map must map"]),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', ["'a' is there twice"]),
        (b'{"weight_map": {"a": "absent.safetensors"}}', ["absent.safetensors: missing shard"]),
        (b'{"weight_map": {"a": "one\\u0000.safetensors"}}', ["missing shard"]),
        (b'{"weight_map": {"a": "\\ud800"}}', ["missing shard"]),
        (b'{"weight_map": {"a": ".."}}', ["is not a file name in this directory"]),
        (b'{"weight_map": {"a": "."}}', ["is not a file name in this directory"]),
        (b'{"weight_map": {"a": ""}}', ["is not a file name in this directory"]),
        (b'{"weight_map": {"a": "../one.safetensors"}}', ["is not a file name in this directory"]),
        (b'{"weight_map": {"a": "/one.safetensors"}}', ["is not a file name in this directory"]),
        (b'{"weight_map": {"a": "model.safetensors.index.json"}}', ["not a safetensors file"]),
    ],
)
def test_an_index_that_is_wrong(tmp_path, content, parts):
    write(tmp_path / "one.safetensors", {"a": entry()})
    (tmp_path / INDEX_FILE).write_bytes(content)
    refused(tmp_path, str(tmp_path), *parts)


def test_a_tensor_that_is_in_another_shard_than_the_index_says(tmp_path):
    write(tmp_path / "one.safetensors", {"a": entry()})
    write(tmp_path / "two.safetensors", {"b": entry()})
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "two.safetensors", "b": "two.safetensors"}}')
    refused(tmp_path, "two.safetensors: the index says it holds tensor 'a', but it does not")


def cache(root):
    """The Hugging Face cache's layout; returns the snapshot."""
    snapshot = root / "models--org--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    blobs = root / "models--org--name" / "blobs"
    blobs.mkdir()
    write(blobs / "f00d", {"a": entry()})
    (blobs / "cafe").write_text('{"weight_map": {"a": "one.safetensors"}}')
    return snapshot


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    snapshot = cache(tmp_path)
    (snapshot / "one.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / INDEX_FILE).symlink_to("../../blobs/cafe")
    assert TensorFiles(snapshot).names() == ["a"]
    (tmp_path / "link").symlink_to(snapshot)
    assert TensorFiles(tmp_path / "link").names() == ["a"]


def test_a_link_inside_the_directory_is_followed(tmp_path):
    write(tmp_path / "one.safetensors", {"a": entry()})
    (tmp_path / SINGLE_FILE).symlink_to("one.safetensors")
    assert TensorFiles(tmp_path).names() == ["a"]


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "one.safetensors"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_that_leads_out_is_followed(tmp_path, name, absolute):
    """People link shards to save space, and the hub's client has filled directories with links into its cache."""
    outside, directory = tmp_path / "blobs" / "f00d", tmp_path / "model"
    directory.mkdir()
    outside.parent.mkdir()
    index = '{"weight_map": {"a": "one.safetensors"}}'
    if name == INDEX_FILE:
        outside.write_text(index)
        write(directory / "one.safetensors", {"a": entry()})
    else:
        write(outside, {"a": entry()})
    if name == "one.safetensors":
        (directory / INDEX_FILE).write_text(index)
    (directory / name).symlink_to(outside if absolute else "../blobs/f00d")
    assert TensorFiles(directory).names() == ["a"]
    outside.unlink()
    refused(directory, f"{name}: a link to ", "f00d, which is not there")


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator can give a link to someone else")
def test_a_link_of_someone_else_is_refused(tmp_path):
    write(tmp_path / "secret", {"a": entry()})
    (tmp_path / "model").mkdir()
    link = tmp_path / "model" / SINGLE_FILE
    link.symlink_to("../secret")
    os.chown(link, 12345, 12345, follow_symlinks=False)
    refused(tmp_path / "model", f"{SINGLE_FILE}: a link of another user (id 12345)")
    os.chown(tmp_path / "model", 12345, 12345)
    assert TensorFiles(tmp_path / "model").names() == ["a"]


def test_a_single_file_counts_before_an_index(tmp_path, caplog):
    write(tmp_path / SINGLE_FILE, {"a": entry()})
    write(tmp_path / "one.safetensors", {"b": entry()})
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"b": "one.safetensors"}}')
    assert TensorFiles(tmp_path).names() == ["a"]
    assert f"{tmp_path}: holds {SINGLE_FILE} beside {INDEX_FILE}" in caplog.text
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "model.safetensors", "b": "one.safetensors"}}')
    assert TensorFiles(tmp_path).names() == ["a", "b"]  # It is one of the shards.
    (tmp_path / INDEX_FILE).write_text("{")
    assert TensorFiles(tmp_path).names() == ["a"]
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"b": "one.safetensors"}}')
    (tmp_path / SINGLE_FILE).unlink()
    assert TensorFiles(tmp_path).names() == ["b"]


def test_tensors_are_compared_by_value(tmp_path, monkeypatch):
    monkeypatch.setattr("fqjax.checkpoint.safetensors.PIECE_VALUES", 4)
    one = np.arange(15, dtype=np.float32).reshape(5, 3)
    other = one.copy()
    other[4, 2] = np.nextafter(np.float32(14), np.float32(15))
    tensors = {"one": one, "copy": one.copy(), "half": one.astype(np.float16), "other": other, "short": one[:4].copy()}
    save_file(tensors, tmp_path / SINGLE_FILE)
    files = TensorFiles(tmp_path)
    assert [name for name in [*tensors, "missing"] if files.same("one", name)] == ["one", "copy", "half"]


def test_a_link_to_itself(tmp_path):
    (tmp_path / "one.safetensors").symlink_to("one.safetensors")
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "one.safetensors"}}')
    refused(tmp_path, "one.safetensors")


def shards(directory, index, **files):
    for name, tensors in files.items():
        save_file({key: np.asarray(values, np.float32) for key, values in tensors.items()}, directory / name)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": index}))


def test_tensors_of_shards_that_the_index_does_not_list(tmp_path):
    shards(tmp_path, {"a": "one"}, one={"a": [1, 2], "b": [3]})
    files = TensorFiles(tmp_path)
    assert files.names() == ["a", "b"] and files.unlisted == {"b"}
    np.testing.assert_array_equal(files.read("b", np.float32), [3])
    shards(tmp_path, {"a": "one", "b": "one"}, one={"a": [1, 2], "b": [3]})
    assert not TensorFiles(tmp_path).unlisted


@pytest.mark.parametrize("index", [{"a": "one", "c": "two"}, {"b": "one", "c": "two"}])
def test_a_tensor_in_two_shards(tmp_path, index):
    """Whichever of them the index names, and if it names none."""
    shards(tmp_path, index, one={"a": [1, 2], "b": 1}, two={"a": [1, 2], "c": [1]})
    np.testing.assert_array_equal(TensorFiles(tmp_path).read("a", np.float32), [1, 2])
    for other in ([1, 3], [1, 2, 3], [[1, 2]]):
        shards(tmp_path, index, two={"a": other, "c": [1]})
        refused(tmp_path, "two: tensor 'a' is in one too, with other values; expected it once")
    shards(tmp_path, index, one={"a": 1, "b": 1}, two={"a": 1, "c": [1]})
    assert TensorFiles(tmp_path).shape("a") == ()
    shards(tmp_path, index, two={"a": 2, "c": [1]})
    refused(tmp_path, "two: tensor 'a' is in one too")


def test_a_shard_that_the_index_does_not_name_is_said(tmp_path, caplog):
    names = {f"{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    shards(tmp_path, names, **{file: {key: [1]} for key, file in names.items()})
    save_file({"a": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert TensorFiles(tmp_path).names() == ["1", "2"] and not caplog.text
    shards(tmp_path, {"1": names["1"]})
    assert TensorFiles(tmp_path).names() == ["1"]
    assert "model-00002-of-00002.safetensors: model.safetensors.index.json does not name this shard" in caplog.text
