"""The packages that pages of the documentation show, file by file, as an installer would write them."""

import json
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.conftest import make_checkpoint

DOCS = Path(__file__).parents[1] / "docs"
FILE = re.compile(r"^```(?:python|toml)\n# ([\w-]+\.(?:py|toml))\n(.*?)^```$", re.M | re.S)
WHOLE = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
"""Tensors of Phi-3 that are several in Llama."""


def install(page: str, name: str, directory: Path, **replaced: str) -> Path:
    """Writes a page's package: blocks that begin with a file's name, and what its pyproject.toml says of entry points.

    Args:
      page: name of a file in docs/, without its ending.
      name: of the package.
      directory: where it goes, for ``sys.path`` or ``PYTHONPATH``.
      replaced: other content of modules, by their name.
    """
    files = defaultdict(list)
    for file, text in FILE.findall((DOCS / f"{page}.md").read_text()):
        files[file].append(text)
    groups = tomllib.loads("".join(files.pop("pyproject.toml")))["project"]["entry-points"]
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    for file, texts in files.items():
        (directory / file).write_text(replaced.get(file.removesuffix(".py"), "".join(texts)))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()) for group, found in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    return directory


def make_phi3(directory: Path) -> Path:
    """The checkpoint of ``make_checkpoint`` as one of Phi-3, which docs/adding_a_model.md shows how to read."""
    make_checkpoint(directory)
    (directory / "model.safetensors.index.json").unlink()
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    config = json.loads((directory / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        for whole, parts in WHOLE.items():
            module = f"model.layers.{layer}.{whole}"
            taken = [tensors.pop(f"{module.rsplit('.', 1)[0]}.{part}.weight") for part in parts]
            tensors[f"{module}.weight"] = np.concatenate(taken)
    save_file(tensors, directory / "model.safetensors")
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
