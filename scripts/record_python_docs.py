"""Records the documentation of the Python that runs it, as text that comes with the package (fqjax/data/python_docs.py).

Examples:
    python3.12 scripts/record_python_docs.py                      # writes fqjax/data/python_3_12
    python3.12 scripts/record_python_docs.py --out /tmp/docs      # elsewhere, to compare

It needs the standard library alone.  The text is that of the topics of ``help()`` and of the standard library's docstrings;
one module in sixteen is held out, by the checksum of its name.  Another version of Python has other docstrings, and the
figures that README and docs show for the bundled model then change: so it is recorded once, under Python 3.12.1.
"""

import argparse
import ast
import inspect
import lzma
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT = 16
"""One module in so many is held out."""

LEFT_OUT = ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "ensurepip")
"""Folders of the standard library that hold no documentation."""


def docstrings(*, held_out: bool) -> Iterator[str]:
    """The docstrings of each module of the standard library, read without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if any(part in LEFT_OUT for part in name.parts) or is_held_out(name) != held_out:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue
        texts = [f"{heading}\n\n{text}" for heading, text in documented(tree)]
        if texts:
            yield "\n\n".join(texts)


def is_held_out(module: Path) -> bool:
    return zlib.crc32(module.as_posix().encode()) % HELD_OUT == 0


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
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


def licence() -> str:
    """Python's licence, which is the text's."""
    candidates = [Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"]
    return next(path for path in candidates if path.is_file()).read_text(encoding="utf-8")


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "fqjax" / "data" / "python_3_12"
    command.add_argument("--out", type=Path, default=default, help="folder to write into")
    out = command.parse_args().out
    texts = {
        "reference": "\n\n".join(topics[name].strip() for name in sorted(topics)),
        "held_out": "\n\n".join(docstrings(held_out=True)),
        "docstrings": "\n\n".join(docstrings(held_out=False)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        compressed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (out / f"{name}.txt.xz").write_bytes(compressed)
        print(f"{out / name}.txt.xz: {len(text)} characters, {len(compressed)} bytes")
    (out / "LICENSE.txt").write_text(licence(), encoding="utf-8")


if __name__ == "__main__":
    main()
