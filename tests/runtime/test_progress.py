import io

import numpy as np
from rich.console import Console

from fqjax.drivers.base import _peek
from fqjax.runtime import progress


def test_the_time_left_is_shown_on_a_terminal(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert "counting" in shown.getvalue() and "3/3" in shown.getvalue() and "left" in shown.getvalue()


def test_nothing_is_shown_elsewhere(capsys):
    assert list(progress.track(iter([1, 2]), "counting")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_looking_at_the_first_batch_keeps_the_number_of_batches():
    batches = [np.zeros((1, 4), np.int32)] * 3
    first, rest = _peek(batches)
    assert first is batches[0] and len(rest) == 3
    first, rest = _peek(iter(batches))
    assert first is batches[0] and len(list(rest)) == 3
