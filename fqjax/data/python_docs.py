"""Documentation of Python 3.12: calibration text where none is given, and the text of the bundled model.

The text comes with the package, compressed, so that a conversion gives the same model under every version of Python.
``scripts/record_python_docs.py`` wrote it, from the topics of ``help()`` and the standard library's docstrings; its licence
is Python's (``python_3_12/LICENSE.txt``).  The docstrings of some modules are held out from the bundled model's training;
a paragraph that stands in them too is left out of the training text.
"""

import lzma
from pathlib import Path

FOLDER = Path(__file__).parent / "python_3_12"
PARTS = ("reference", "held_out", "docstrings")
"""The topics of ``help()``; the docstrings of modules held out; those of all other modules."""


def reference_text() -> str:
    """The topics of ``help()``: some 490 kB on the language."""
    return _part("reference")


def held_out_text() -> str:
    """The docstrings that the bundled model never saw: some 140 kB."""
    return _part("held_out")


def training_text() -> str:
    """The bundled model's training text, some 2 MB: the other docstrings and the reference."""
    text = "\n\n".join([_part("docstrings"), reference_text()])
    unseen = set(held_out_text().split("\n\n"))
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph not in unseen)


def _part(name: str) -> str:
    return lzma.decompress((FOLDER / f"{name}.txt.xz").read_bytes()).decode()
