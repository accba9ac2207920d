"""Fixtures that several test files use."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before JAX starts: an interpreted GPU kernel holds one of XLA's threads for each of its warpgroups, and waits for ever if
# there are not as many.
os.environ.setdefault("NPROC", "16")

# Most of the time goes into compiling programs that run once or twice, so they are hardly optimized, unless they are a GPU's.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 has them optimized.
if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones do not know the flag.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

os.environ["FQJAX_COMPILATION_CACHE"] = "off"  # Commands in processes of their own leave the user's directory alone.

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fqjax.demo.run import CHECKPOINT
from fqjax.runtime import progress
from fqjax.runtime.errors import InputError
from tests import compilation_cache
from tests.models import variants

compilation_cache.use()

progress.EVERY = float("inf")  # Tests count the lines on stderr, however slow the machine is.

pytest_plugins = ["pytester", "tests.tiers"]

COMPILED_BYTES = 3 * 2**30
"""Memory of a test process, mostly compiled programs, beyond which they are dropped."""


LONGEST = (
    "test_shared_checkpoints.py",
    "test_convert_faults.py",
    "test_streaming.py",
    "test_demo.py",
    "test_experts.py",
    "test_convert.py",
    "test_cli.py",
    "test_compressed_reading.py",
    "test_integer_scales.py",
    "test_serve.py",
    "test_generate.py",
)
"""Files of tests that take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest files: at the end one process would be left alone with them."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drops compiled programs once a process has gathered many: several hundred tests compile for shapes of their own."""
    yield
    statm = Path("/proc/self/statm")
    if statm.is_file() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > COMPILED_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Directory of real checkpoints and text that lies beside the repository on some machines."""
    path = Path(os.environ.get("FQJAX_SHARED", Path(__file__).parents[2] / "shared"))
    if not (path / "models").is_dir():
        pytest.skip("no directory of real checkpoints; set FQJAX_SHARED to one")
    return path


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A small Llama in two shards with a tokenizer, as a Hugging Face directory."""
    return make_checkpoint(tmp_path / "source")


@pytest.fixture
def text(tmp_path) -> Path:
    """A text to calibrate on."""
    words = np.random.default_rng(0).choice(["return", "class", "the", "list", "of", "value", "error"], 3000)
    path = tmp_path / "calibration.txt"
    path.write_text(" ".join(words))
    return path


def refused(message, call, *args) -> None:
    """Expects an error of one line that a user can read."""
    with pytest.raises(InputError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


def make_checkpoint(directory: Path, name: str = "llama-grouped") -> Path:
    """A variant with the bundled tokenizer and its vocabulary, in two shards."""
    config = variants.VARIANTS[name] | {"vocab_size": 2048, "max_position_embeddings": 128}
    variants.write_checkpoint(directory, config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / file, directory / file)
    shard(directory)
    return directory


def shard(directory: Path) -> None:
    """Splits the single file of a checkpoint into two shards with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def edit_config(directory: Path, **changes: object) -> None:
    """Sets entries of a checkpoint's config.json; None takes one away."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensor(directory: Path, name: str, change) -> None:
    """Rewrites one tensor of a sharded checkpoint; ``change`` returns None to leave it out."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(np.array(tensors.pop(name)))
    if changed is None:
        del index["weight_map"][name]
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file(tensors, file)
