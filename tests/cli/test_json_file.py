"""The file of ``--json``: refused at once where it cannot be written, and never left in part."""

import errno
import os
import tempfile

import pytest

from fqjax.cli import app, main
from fqjax.runtime.errors import InputError

COMMANDS = {
    "inspect": ["inspect", "no-model"],
    "eval": ["eval", "no-model", "--text", "no-text"],
    "bench": ["bench", "kernels"],
}


def refused(capsys, command, path, told):
    """The model is missing, too: that the file is what is told of shows that it was looked at first."""
    assert main.main([*COMMANDS[command], "--json", str(path)]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1 and told in shown.err, shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_cannot_be_written_are_refused_before_any_work(capsys, command, tmp_path):
    refused(capsys, command, tmp_path, "a directory; expected a file")
    refused(capsys, command, tmp_path / "none" / "a.json", "its directory does not exist")
    (tmp_path / "file").write_text("kept")
    refused(capsys, command, tmp_path / "file" / "a.json", "its directory does not exist")
    refused(capsys, command, "gs://bucket/a.json", "not a path on this machine")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_directories_in_which_nothing_can_be_written(capsys, monkeypatch, command, code, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("kept")

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os if code in (errno.ENOSPC, errno.EDQUOT) else tempfile, _name(code), fail)
    refused(capsys, command, path, f"a.json: cannot be written ({os.strerror(code)})")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "kept"


def _name(code):
    return "fsync" if code in (errno.ENOSPC, errno.EDQUOT) else "TemporaryFile"


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_files_and_directories_without_permission(capsys, tmp_path):
    path = tmp_path / "a.json"
    path.write_text("kept")
    path.chmod(0o400)
    refused(capsys, "inspect", path, "cannot be written (Permission denied)")
    path.chmod(0o600)
    tmp_path.chmod(0o500)
    refused(capsys, "inspect", path, "cannot be written (Permission denied)")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_leaves_the_file_as_it_was(there, capsys, tmp_path):
    path = tmp_path / "a.json"
    if there:
        path.write_text("kept")
    assert main.main([*COMMANDS["inspect"], "--json", str(path)]) == 2
    assert "no-model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == (["a.json"] if there else [])
    assert not there or path.read_text() == "kept"


def test_a_disk_that_is_full_when_the_result_is_there(monkeypatch, tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link.json"
    path.write_text("kept")
    link.symlink_to(path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="a.json: cannot be written .No space left on device"):
            app.write_json(link, {"a": 1})
    assert path.read_text() == "kept" and {path.name for path in tmp_path.iterdir()} == {"a.json", "link.json"}
    app.write_json(link, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n' and link.is_symlink()


def test_devices_are_written_to(capfdbinary):
    app.write_json(app._writable(app.Path("/dev/fd/1")), {"a": 1})
    assert capfdbinary.readouterr().out == b'{\n "a": 1\n}\n'
