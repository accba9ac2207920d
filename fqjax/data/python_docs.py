"""Text that every Python has: the language reference of ``help()``, and the standard library's docstrings.

The bundled model was trained on it, and the reference serves as calibration text where none is given.  The docstrings of
some modules are held out, by the checksum of the module's name, so they are the same ones in every version of Python; a
paragraph that stands in them too is left out of the training text.
"""

import ast
import inspect
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 16
"""One module in so many is held out."""

LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "ensurepip")
"""Folders of the standard library that hold no documentation."""


def reference_text() -> str:
    """The topics of ``help()``: some 450 kB on the language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def held_out_text() -> str:
    """The docstrings that the bundled model never saw: some 80 kB."""
    return "\n\n".join(_docstrings(held_out=True))


def training_text() -> str:
    """The bundled model's training text: the reference and the other docstrings.  Takes a few seconds."""
    text = "\n\n".join([*_docstrings(held_out=False), reference_text()])
    unseen = set(held_out_text().split("\n\n"))
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in unseen)


def _docstrings(*, held_out: bool) -> Iterator[str]:
    """The docstrings of each module of the standard library, read without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in LEFT_OUT for part in name.parts) or _is_held_out(name) != held_out:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        texts = [f"{heading}\n\n{text}" for heading, text in _documented(tree)]
        if texts:
            yield "\n\n".join(texts)


def _is_held_out(module: Path) -> bool:
    return zlib.crc32(module.as_posix().encode()) % HELD_OUT == 0


def _documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Signature-like heading and docstring of everything documented in a module."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node, clean=False)
        if not text or len(text) < 40:
            continue
        if isinstance(node, ast.ClassDef):
            heading = f"class {node.name}"
        elif isinstance(node, ast.Module):
            heading = "module"
        else:
            heading = f"{node.name}({', '.join(a.arg for a in node.args.args)})"
        yield heading, inspect.cleandoc(text)
