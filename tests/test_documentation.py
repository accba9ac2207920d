"""The documentation names modules, functions and files that there are."""

import importlib
import re
from pathlib import Path

import pytest

from fqjax.registry import GROUPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAME = re.compile(r"(?<![\w/.-])((?:fqjax|pallas_kernels)(?:\.\w+)+)")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```", re.S | re.M)
PROSE_WIDTH = 126
"""Characters of a line at most, as in code.  Tables and blocks of code, which cannot be wrapped, may be wider, and so may
benchmarks, which scripts write."""

NO_NAMES = {"fqjax.json", *(f"fqjax.{group}" for group in GROUPS)}
"""A file, and groups of entry points."""


def resolves(name):
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_and_links_lead_somewhere(page):
    text = page.read_text()
    names = {name for name in NAME.findall(text) if name not in NO_NAMES}
    assert [name for name in sorted(names) if not resolves(name)] == []
    links = {link for link in LINK.findall(text) if "://" not in link}
    assert [link for link in sorted(links) if not (page.parent / link).exists()] == []


def test_prose_is_wrapped():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        lines = FENCED.sub("", page.read_text()).splitlines()
        long = [line for line in lines if len(line) > PROSE_WIDTH and not line.startswith("|")]
        assert not long, (page.name, long[0])


def test_every_page_is_in_the_index():
    listed = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.S)
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES[1:]} - {"index"}
    lines = [line for part in listed for line in part.split("\n") if line and not line.startswith(":")]
    assert sorted(line.rpartition("<")[2].rstrip(">") for line in lines) == sorted(pages)
