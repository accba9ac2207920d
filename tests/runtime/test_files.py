"""Paths that are looked at and written to."""

import errno
import os
from pathlib import Path

import pytest

from fqjax.checkpoint.target import check_target, new_directory, write_tensors
from fqjax.runtime.arguments import check_path
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import check_local, check_new, exists


@pytest.mark.parametrize("path", ["gs://bucket/out", "s3://bucket/out", "file:///out", "hdfs:/out", "https://a.b/out"])
def test_an_address_is_no_path(path):
    for check in (check_local, check_new, check_target):
        with pytest.raises(InputError, match="not a path on this machine"):
            check(Path(path))


@pytest.mark.parametrize("name", ["a\udcff", "a\nb", "a\x00", "\x1b[1m", "a\x7f"])
def test_characters_that_cannot_be_shown(tmp_path, name):
    with pytest.raises(InputError, match="expected characters that can be shown") as caught:
        check_new(tmp_path / name)
    assert str(caught.value).isprintable()


def test_the_directory_above_is_there(tmp_path):
    """Also above one that there is not yet, which is made on the way."""
    with pytest.raises(InputError, match="exists already"):
        check_new(tmp_path / "none" / "..")


@pytest.mark.parametrize("name", ["a\\b", "a[b]", "a*", "a?", "a.orbax-checkpoint-tmp"])
def test_what_orbax_takes_for_something_else(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / f"{name}2", tmp_path / name / "out", tmp_path / "link" / "out"):
        check_new(path)
        with pytest.raises(InputError, match="which Orbax takes for"):
            check_target(path)


@pytest.mark.parametrize("name", ["out", "ä 1", "a:b", "a%20", "{a}", "~", "$HOME", "a#b", "日本"])
def test_other_names_are_let_pass(tmp_path, name):
    check_new(tmp_path / name)
    check_target(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("~/out", f"begins with ~.*expected {os.path.expanduser('~/out')}$"),
        ("~", "begins with ~"),
        ("~nobody-is-named-so/out", "begins with ~.*expected /.*/~nobody-is-named-so/out$"),
        ("C:/out", "begins with a drive"),
        ("c:\\\\out", "begins with a drive"),
        ("D:", "begins with a drive"),
        ("n" * 201, r"nnn\.\.\.: its name has 201 bytes; expected at most 200"),
        ("ä" * 101, "its name has 202 bytes"),
        ("n/" * 2000 + "out", "its path has .* bytes; expected at most 3800"),
        ("n" * 300 + "/out", "cannot be looked at .*too long"),
        ("loop/out", "cannot be looked at .*symbolic links"),
        ("one/two/out", "cannot be looked at .*symbolic links"),
        ("loop", "exists already"),
    ],
)
def test_paths_at_which_nothing_could_be_written(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    for name, target in (("loop", "loop"), ("one", "other"), ("other", "one")):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(InputError, match=message) as caught:
        check_new(Path(path))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n" * 200, "ä" * 100])
def test_the_longest_name_is_written(tmp_path, name):
    check_new(tmp_path / name)
    with new_directory(tmp_path / name) as staging:
        staging.mkdir()
        (tmp_path / f"{staging.name}.orbax-checkpoint-tmp").touch()
    assert (tmp_path / name).is_dir()


def test_a_current_directory_that_was_removed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for check in (check_local, check_new, check_target, lambda path: check_path("path", path)):
        with pytest.raises(
            InputError, match="^out: the current directory cannot be used .*; expected an absolute path$"
        ):
            check(Path("out"))
        check(tmp_path / "out")


def test_what_exists(tmp_path, monkeypatch):
    assert exists(tmp_path) and not exists(tmp_path / "a")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert exists(tmp_path / "link") and not exists(tmp_path / "file" / "a")
    assert not exists(tmp_path / "a\0") and not exists(tmp_path / "a\ud800")  # No file can have such a name.
    with pytest.raises(InputError, match="cannot be looked at .*File name too long"):
        exists(tmp_path / ("a" * 300))

    def closed(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "lstat", closed)
    with pytest.raises(InputError, match=r"cannot be looked at \(Permission denied\)"):
        exists(tmp_path)


@pytest.mark.parametrize("how", [OSError(errno.EIO, "Input/output error"), ValueError("something else")])
def test_a_directory_that_could_not_be_filled_leaves_nothing(tmp_path, how):
    def fill():
        with new_directory(tmp_path / "out") as staging:
            staging.mkdir()
            (staging / "file").touch()
            raise how

    with pytest.raises(InputError if isinstance(how, OSError) else ValueError):
        fill()
    assert not list(tmp_path.iterdir())


def test_tensors_have_the_permissions_of_any_file(tmp_path):
    write_tensors(tmp_path / "tensors", {}, {})
    (tmp_path / "file").touch()
    assert (tmp_path / "tensors").stat().st_mode == (tmp_path / "file").stat().st_mode
