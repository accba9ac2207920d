"""What people give in place of a model's directory, and what is expected instead."""

import os
from pathlib import Path

EXPECTED = "expected a directory with config.json and safetensors"

PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
"""Endings of files that torch writes."""

OTHER_SUFFIXES = {
    ".gguf": "GGUF, the format of llama.cpp",
    ".ggml": "GGML, a format of llama.cpp",
    ".h5": "HDF5, as Keras writes it",
    ".msgpack": "msgpack, as Flax wrote it",
    ".onnx": "ONNX",
    ".npz": "NumPy's",
}


def format_of(path: Path) -> str | None:
    """What fqjax does not read, in words, by the ending of its name; None for other endings."""
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        return "a pickle, which fqjax does not read"
    return f"{OTHER_SUFFIXES[suffix]}, which fqjax does not read" if suffix in OTHER_SUFFIXES else None


def foreign(path: Path) -> str | None:
    """Why a path is no model's directory, if it is a file or has the ending of one; None for others."""
    known = format_of(path)
    if known is not None and not path.is_dir():
        return f"{known}; {EXPECTED}, as save_pretrained writes it"
    if not path.is_file():
        return None
    if path.suffix in (".safetensors", ".json"):
        return f"a file; expected the directory that it is in, {path.parent}"
    return "a file; expected a model's directory"


def foreign_inside(directory: Path) -> str | None:
    """The first file of a directory in a format that fqjax does not read, in words; None if there is none."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return None
    return next((f"{name} is {known}" for name in names if (known := format_of(Path(name))) is not None), None)
