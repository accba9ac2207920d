"""Library calls leave the process as it was: backends, hooks, loggers, environment, memory that the C library keeps."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import types
import warnings
import weakref

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.checkpoint.lazy import quiet_transformers
from fqjax.report.plots import plot_report
from fqjax.runtime import memory
from fqjax.runtime.errors import InputError
from fqjax.runtime.quiet import contained, forget, muted
from tests.models import variants


def state():
    """What is the whole process's and a caller may have set."""
    loggers = {None: logging.getLogger()} | logging.root.manager.loggerDict
    levels = {
        name: (logger.level, logger.disabled, logger.propagate, list(logger.filters), list(logger.handlers))
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger)
    }
    return {
        "backend": matplotlib.get_backend(),
        "settings": dict(matplotlib.rcParams),
        "hooks": (sys.unraisablehook, sys.excepthook, sys.displayhook, sys.stdout, sys.stderr),
        "loggers": levels,
        "disabled": logging.root.manager.disable,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "warnings": list(warnings.filters),
        "floating": np.geterr(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "jax": dict(jax.config.values),
        "generator": np.random.get_state()[1].tobytes(),
    }


def run_all(folder):
    """The public calls that reach other packages; two of them fail."""
    directory = variants.write_checkpoint(folder / "source", variants.VARIANTS["llama-grouped"])
    fqjax.load_hf(directory, jnp.float32)
    model, data = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0))), [jnp.ones((4, 64)).at[0, 3].set(9)]
    quantized, report = fqjax.quantize(model, "w4a8-gptq", data)
    plot_report(quantized, report, folder / "plots")
    fqjax.save(folder / "out", quantized, report=report)
    fqjax.load(folder / "out", nnx.eval_shape(lambda: model))
    for path in (folder / "out" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    with pytest.raises(InputError):
        fqjax.load(folder / "out", nnx.eval_shape(lambda: model))
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError):
        fqjax.load_tokenizer(directory)


def test_library_calls_leave_the_process_as_it_was(tmp_path, monkeypatch):
    trimmed = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: trimmed.append)
    with matplotlib.rc_context({"backend": "svg"}):
        with contextlib.suppress(InputError):
            run_all(tmp_path / "first")  # What is imported on the way may set itself up.
        matplotlib.use("svg")
        before = state()
        run_all(tmp_path / "second")
        after = state()
    for name, value in before.items():
        shared = {key: after[name][key] for key in value} if name == "loggers" else after[name]
        assert shared == value, name
    assert not trimmed


def test_memory_is_given_back_to_the_system_only_where_it_is_asked_for(monkeypatch):
    trimmed = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: trimmed.append)
    memory.give_back()
    with memory.giving_back():
        memory.give_back()
    memory.give_back()
    assert trimmed == [0]


def test_muted_loggers_keep_their_levels_and_speak_again():
    logger, heard = logging.getLogger("fqjax_test_muted"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with muted("fqjax_test_muted"):
        with muted("fqjax_test_muted"):
            logger.error("one")
        logger.error("two")
        logging.getLogger("fqjax_test_muted.below").error("three")
        assert logger.level == logging.INFO
    logger.info("four")
    assert heard == ["four"] and not logger.filters and not handler.filters


def test_a_failed_call_hides_what_is_left_of_it_alone(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    filters = list(warnings.filters)
    coroutines = (
        "async_serialize_from_host",
        "async_serialize_from_host.<locals>.write_fragment",
        "Store.write",
        "main",
    )
    with pytest.warns(RuntimeWarning) as warned, contained():
        for text in ("Event loop is closed", "other"):
            sys.unraisablehook(types.SimpleNamespace(object=None, exc_value=RuntimeError(text)))
        for name in coroutines:
            warnings.warn(f"coroutine '{name}' was never awaited", RuntimeWarning, stacklevel=1)
    assert [str(u.exc_value) for u in told] == ["other"] and sys.unraisablehook == told.append
    assert [str(one.message) for one in warned] == ["coroutine 'main' was never awaited"]
    assert warnings.filters == filters


def test_what_is_collected_after_a_failed_call_is_dropped_by_any_name():
    async def main():
        pass

    with warnings.catch_warnings(record=True) as warned, contained() as settle:
        warnings.simplefilter("always")
        held = [main()]
        held.append(held)  # A cycle, as frames and their errors are.
        del held
        settle()
    assert not warned


def test_a_failed_call_is_waited_for():
    """Its threads, and what they and the error hold."""
    ended, held = [], []

    class Loop:
        pass

    def work():
        time.sleep(0.2)
        ended.append(True)

    def fail():
        loop = Loop()
        loop.itself = loop
        held.append(weakref.ref(loop))
        threading.Thread(target=work).start()
        raise ValueError

    with contained() as settle:
        try:
            fail()
        except ValueError as error:
            forget(error)
        settle()
    assert ended and held[0]() is None


def test_transformers_is_quiet_by_nothing_but_filters(capsys):
    with quiet_transformers() as transformers:
        level = transformers.logging.get_verbosity()
        transformers.logging.get_logger("transformers.models").error("never heard")
    assert transformers.logging.get_verbosity() == level and "never heard" not in capsys.readouterr().err
    assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ


@types.coroutine
def forever():
    yield


async def stubborn():
    try:
        await forever()
    except GeneratorExit as error:
        raise ValueError("not while it is closed") from error


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_closed_coroutine_raises_is_dropped_with_the_call_that_failed(inside, monkeypatch):
    reported = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    with contained() if inside else contextlib.nullcontext():
        begun = stubborn()
        begun.send(None)
        del begun
    assert reported == ([] if inside else ["not while it is closed"])
