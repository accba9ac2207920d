import io
import itertools
import sys

import numpy as np
import pytest
from rich.console import Console

from fqjax.drivers.base import _peek
from fqjax.runtime import progress


def test_the_time_left_is_shown_on_a_terminal(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" in shown.getvalue() and "3/3" in shown.getvalue() and "left" in shown.getvalue()


def test_nothing_is_shown_elsewhere_of_what_is_done_soon(capsys):
    assert list(progress.track(iter([1, 2]), "counting")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("items", "lines"),
    [
        ([1, 2, 3], ["counting 2/3, 6 s, about 3 s left", "counting 3/3, 9 s"]),
        (iter([1, 2, 3, 4]), ["counting 2, 6 s", "counting 4, 12 s"]),
    ],
)
def test_without_a_terminal_lines_say_how_far_it_is(monkeypatch, capsys, items, lines):
    clock = itertools.count(0, 3)
    monkeypatch.setattr(progress, "EVERY", 5.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: min(next(clock), 12))
    list(progress.track(items, "counting"))
    out, err = capsys.readouterr()
    assert not out and err.splitlines() == lines


def test_a_line_names_the_part_of_a_longer_work(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.part_of_all("w8a8 (2 of 5)"):
        list(progress.track([1], "calibrating"))
    list(progress.track([1], "calibrating"))
    err = capsys.readouterr().err.splitlines()
    assert err == ["w8a8 (2 of 5): calibrating 1/1, 0 s", "calibrating 1/1, 0 s"]


def test_a_line_that_cannot_be_written_stops_nothing(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(sys, "stderr", closed)
    progress._say("counting", 1, 2, 0.0)


def test_looking_at_the_first_batch_keeps_the_number_of_batches():
    batches = [np.zeros((1, 4), np.int32)] * 3
    first, rest = _peek(batches)
    assert first is batches[0] and len(rest) == 3
    first, rest = _peek(iter(batches))
    assert first is batches[0] and len(list(rest)) == 3
