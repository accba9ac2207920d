"""What the command line compiles is found by its next run, and nothing that is wrong with the directory shows."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fqjax.cli import main as cli
from fqjax.runtime import program_cache
from fqjax.runtime.program_cache import JAXS_OWN, SWITCH, bound, kept_programs, machine, programs_directory

PROGRAM = """
import collections
from fqjax.runtime import program_cache

program_cache.LEAST_SECONDS = 0.0
with program_cache.kept_programs() as path:
    import jax
    import jax.numpy as jnp

    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
    jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((16, 16))).block_until_ready()
print(path, events["cache_hits"], events["cache_misses"])
"""


def run(folder: Path) -> tuple[Path, int, int]:
    """The directory, hits and misses of a process of its own, which complains of nothing."""
    root = str(Path(__file__).parents[2])
    environment = {name: value for name, value in os.environ.items() if name not in (JAXS_OWN, SWITCH)}
    environment |= {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert "cache" not in done.stderr
    path, hits, misses = done.stdout.split()
    return Path(path), int(hits), int(misses)


def test_a_second_process_finds_what_the_first_compiled_and_is_whole(tmp_path):
    path, hits, misses = run(tmp_path)
    assert path == tmp_path / "fqjax" / "compiled" / path.name and hits == 0 < misses
    kept = list(path.glob("*-cache"))
    assert kept and path.stat().st_mode & 0o777 == 0o700
    _, again, compiled = run(tmp_path)
    if again:  # On some processors XLA rejects what it compiled itself.
        assert (again, compiled) == (misses, 0) and list(path.glob("*-cache")) == kept
        for program in kept:
            program.write_bytes(program.read_bytes()[:-20])
        assert run(tmp_path)[1] == 0
    assert not list(path.glob("*-cache"))  # The next run compiles, and keeps, all that could not be read.


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """As before JAX is imported, with a cache in a temporary directory."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv(SWITCH, str(tmp_path / "cache"))
    monkeypatch.delenv(JAXS_OWN, raising=False)
    return tmp_path / "cache"


def in_use():
    with kept_programs() as path:
        assert os.environ.get(JAXS_OWN, "") == ("" if path is None else str(path))
        return path


def test_another_directory_may_be_named(alone):
    assert in_use() == programs_directory() and programs_directory().parent == alone


@pytest.mark.parametrize(("name", "value"), [(SWITCH, "off"), (JAXS_OWN, "elsewhere"), (JAXS_OWN, "")])
def test_it_can_be_switched_off_and_leaves_jaxs_own_alone(alone, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with kept_programs() as path:
        assert path is None and os.environ[name] == value
    assert not alone.exists()


def test_nothing_is_kept_once_jax_has_been_imported(alone, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", object())
    assert in_use() is None and not alone.exists()


def test_directories_that_cannot_be_used_are_no_failure(alone, monkeypatch, tmp_path):
    with monkeypatch.context() as closed:
        closed.setattr(os, "access", lambda path, mode: False)
        assert in_use() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(SWITCH, str(tmp_path / "file"))
    assert in_use() is None
    monkeypatch.setenv(SWITCH, str(tmp_path / "shared"))
    programs_directory().mkdir(parents=True)
    programs_directory().chmod(0o777)  # Whoever writes a program there has it run.
    assert in_use() is None
    programs_directory().chmod(0o700)
    assert in_use() is not None


def test_what_is_not_known_is_no_failure(alone, monkeypatch):
    def version(name):
        raise program_cache.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(program_cache.importlib.metadata, "version", version)
    assert in_use() is None


def test_another_processor_or_jaxlib_has_another_directory(monkeypatch, tmp_path):
    (cpuinfo := tmp_path / "cpuinfo").write_text("model name : x\nflags\t\t: fpu avx\nMHz : 1\n\nflags : fpu\n")
    usual, directory = machine(), programs_directory()
    with monkeypatch.context() as another:
        another.setattr(program_cache, "CPUINFO", cpuinfo)
        assert machine() != usual and programs_directory() != directory
        here = machine()
        cpuinfo.write_text("model name : x\nflags\t\t: fpu avx\nMHz : 2\n\n")
        assert machine() == here
        cpuinfo.write_text("model name : y\nflags\t\t: fpu avx\nMHz : 2\n\n")
        assert machine() != here
        another.setattr(program_cache, "CPUINFO", tmp_path / "none")
        here = machine()
        another.setattr(program_cache.platform, "node", lambda: "another")
        assert machine() != here
    monkeypatch.setattr(program_cache.importlib.metadata, "version", lambda name: "9.9")
    assert programs_directory().name == f"9.9-{usual}"


def test_jaxs_other_warnings_are_shown(alone):
    with pytest.warns(UserWarning, match="something else"), kept_programs():
        warnings.warn("something else", stacklevel=1)
    assert warnings.showwarning.__name__ != "heard"


def test_the_oldest_programs_are_deleted_beyond_a_size(tmp_path):
    for i, name in enumerate(("one/a-cache", "two/b-cache", "two/c-cache", "two/other")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12345")
        os.utime(tmp_path / name, (i, i))
    bound(tmp_path, 15)
    assert len(list(tmp_path.glob("*/*"))) == 4
    bound(tmp_path, 14)
    assert {path.name for path in tmp_path.glob("*/*")} == {"c-cache", "other"}


@pytest.mark.parametrize(("command", "keeps"), [("generate", True), ("bench", False), ("--help", False)])
def test_commands_that_compute_keep_programs(monkeypatch, command, keeps):
    opened = []

    @contextlib.contextmanager
    def keeping():
        opened.append(command)
        yield

    monkeypatch.setattr(cli, "kept_programs", keeping)
    monkeypatch.setattr(cli, "main", lambda: 0)
    for name in ("open_streams", "show_warnings"):
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "argv", ["fqjax", command])
    with pytest.raises(SystemExit):
        cli.run()
    assert bool(opened) == keeps
