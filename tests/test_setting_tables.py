"""The tables of settings in the documentation list the fields that the schemes and methods have."""

import re
from pathlib import Path

import pytest

from fqjax import methods
from fqjax.presets import PRESETS
from fqjax.runtime.overrides import keys_of
from fqjax.runtime.settings import Settings, hints_of

DOCS = Path(__file__).parents[1] / "docs"
OF_ITS_OWN = {"int8_head", "int8_layers"}
"""Keys that are no field: words of a scheme for its head and its rules."""


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first row this is."""
    table = (DOCS / page).read_text().split(f"\n{heading}\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([\w.-]+)`", text)


def of_the_command_line() -> dict[str, tuple[set[str], set[str]]]:
    """For each name of a scheme, or beginning of names, the keys that all have, and those that some have besides."""
    found, always, some = {}, set(), set()
    for names, keys in rows("command_line.md", "| scheme | keys |"):
        common, _, conditional = keys.partition("; with ")
        before = (always, some) if common.startswith("the same") else (set(), set())
        always = before[0] | set(quoted(common))
        some = before[1] | {key for key in quoted(conditional) if not key.startswith("-")}
        found.update({name.removesuffix("..."): (always, some) for name in quoted(names) or [""]})
    return found


def test_the_command_lines_table_has_every_key_and_no_other():
    documented = of_the_command_line()
    every, _ = documented[""]
    assert every >= OF_ITS_OWN
    met: dict[str, set[str]] = {}
    for name, scheme in PRESETS.items():
        entry = max((prefix for prefix in documented if name.startswith(prefix)), key=len)
        always, some = documented[entry]
        have = {key.rpartition(".")[2] for key in keys_of(scheme)} | OF_ITS_OWN
        if scheme.method is None:
            always, some = set(), set()
        assert always | every <= have <= always | some | every, name
        met[entry] = met.get(entry, set()) | have
    for entry, (always, some) in documented.items():
        assert not entry or met[entry] == always | some | every, entry


@pytest.mark.parametrize(
    "row", rows("schemes.md", "| class | kind | settings of its own | presets |"), ids=lambda r: r[0]
)
def test_the_table_of_methods_has_every_field(row):
    cls = getattr(methods, quoted(row[0])[0])
    assert cls.kind in quoted(row[1])
    shared = {key for keys, part, _ in rows("schemes.md", "| key | part | meaning |") for key in quoted(keys + part)}
    own = {key for key in quoted(row[2]) if key in hints_of(cls)}
    assert set(quoted(row[2])) == own and own == set(hints_of(cls)) - (shared - own)


def test_every_method_is_in_the_table():
    listed = {quoted(row[0])[0] for row in rows("schemes.md", "| class | kind | settings of its own | presets |")}
    assert listed == {type(scheme.method).__name__ for scheme in PRESETS.values() if scheme.method is not None}


def test_the_table_of_shared_settings_has_fields_alone():
    known: set[str] = set().union(*(keys_of(scheme) for scheme in PRESETS.values()), OF_ITS_OWN)
    known = {key.rpartition(".")[2] for key in known}
    parts = {name for scheme in PRESETS.values() if scheme.method for name in parts_of(scheme.method)}
    for keys, part, _ in rows("schemes.md", "| key | part | meaning |"):
        named = {re.split("[= ]", key)[0] for key in re.findall("`([^`]+)`", keys)} - {"gptq", "none"}
        assert named and named <= known and set(quoted(part)) <= parts, keys


def parts_of(settings: Settings) -> list[str]:
    return [name for name in hints_of(type(settings)) if isinstance(getattr(settings, name), Settings)]
