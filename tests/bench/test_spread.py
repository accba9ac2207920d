"""How far repetitions lie apart, in JSON and in what is printed."""

import pytest

from fqjax.bench import kernels, model
from fqjax.bench.model_cases import Case
from fqjax.bench.model_times import DECODED_TOKENS, SHORT_CALL_TOKENS, TIMED_CALLS, measure
from fqjax.bench.random_models import architecture, random_model
from fqjax.bench.spread import LARGE_NOISE, noise, spread_of, verdict
from fqjax.presets import PRESETS
from pallas_kernels import timing

KERNEL = {
    "kernel": "k",
    "M": 1,
    "N": 2,
    "K": 3,
    "microseconds": 4.0,
    "tops": 1.0,
    "tb_per_s": 1.0,
    "ratio_to_bf16": 1.0,
}
MODEL = {"scheme": "s", "phase": "decode", "batch": 1, "length": 8, "milliseconds": 4.0, "tokens_per_second": 1.0}
MODEL |= {"device_bytes": 1, "ratio_to_bf16": 1.0}
QUIET, NOISY = spread_of([4.0, 4.1, 90.0, 4.2, 4.1]), spread_of([4.0, 5.0, 5.2, 3.0, 5.0])


def test_noise_is_what_the_median_takes_longer_than_the_least():
    assert QUIET == {"min": 4.0, "median": 4.1, "max": 90.0}
    assert noise(QUIET) == pytest.approx(0.025) and noise(NOISY) == pytest.approx(2 / 3)
    assert noise(spread_of([0.0, 1.0])) == float("inf")
    assert noise(QUIET) < LARGE_NOISE < noise(NOISY)


@pytest.mark.parametrize(("line", "row", "shown"), [(kernels.line, KERNEL, "2f"), (model.line, MODEL, "3f")])
def test_lines_show_it(line, row, shown):
    assert "(" not in line(row) and "NOISY" not in line(row)  # A row of an older record.
    assert f"({4:.{shown}} to {90:.{shown}})" in line(row | {"spread": QUIET}) and "NOISY" not in line(
        row | {"spread": QUIET}
    )
    assert line(row | {"spread": NOISY}).endswith("  NOISY")


def test_the_summary_says_when_noise_is_large():
    quiet, noisy = {"spread": QUIET}, {"spread": NOISY}
    assert verdict([quiet, {}]) == []
    (said,) = verdict([quiet, noisy, {}])
    assert "in 1 of 2 rows" in said and "by 67% at most" in said
    result = {"device": "d", "versions": {}, "date": "today", "rows": [noisy], "skipped": []}
    result["ceilings"] = {"bf16_tflops": 1.0, "int8_tops": 1.0, "copy_tb_per_s": 1.0}
    for summary in (kernels.summary, model.summary):
        assert "Noise is large" in summary(result) and "Noise" not in summary(result | {"rows": [quiet]})


def test_every_round_is_a_time(monkeypatch):
    monkeypatch.setattr(timing, "kernel_times", lambda run: [("wall clock", next(ticks))])
    ticks = iter([10.0, 30.0, 20.0] * 2)
    arguments = [(1,), (2,)]
    assert timing.rounds(lambda x: x, arguments, repeats=3) == [5.0, 15.0, 10.0]
    assert timing.microseconds(lambda x: x, arguments, repeats=3) == 10.0


def test_a_token_is_told_from_every_call(monkeypatch):
    """Its least is the row's own figure."""
    called = []

    def seconds(self, program):
        called.append(program)
        steps = DECODED_TOKENS if len(called) % 2 else SHORT_CALL_TOKENS
        return 1e-3 * (2 + steps * (1.0 if len(called) < 9 else 1.5))

    monkeypatch.setattr("fqjax.bench.model_times._Decoding.seconds", seconds)
    found = measure(random_model(*architecture("tiny"), PRESETS["bf16"]), Case("decode", 1, 8))
    assert len(called) == 2 * (TIMED_CALLS + 1)
    assert found["milliseconds"] == pytest.approx(1.0) and found["call_milliseconds"] == pytest.approx(2.0)
    spread = found["spread"]
    assert spread["min"] == found["milliseconds"]
    assert spread["median"] == spread["max"] == pytest.approx((1.5 * 32 - 4) / 28)
