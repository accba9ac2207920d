"""The record of whole models' times: what is kept of it when it is measured again, and how it reads."""

import collections
from collections.abc import Mapping

from fqjax.bench.environment import describe
from fqjax.bench.model import ModelResult, ModelRow
from fqjax.bench.model_cases import BASELINE_SCHEME, Case
from fqjax.bench.model_times import DECODED_TOKENS, LISTED_KERNELS, SHORT_CALL_TOKENS

WHOLE_CALL = "†"
"""Mark after times of decoding that were measured before tokens were told from the call."""


def combined(before: ModelResult | None, result: ModelResult) -> ModelResult:
    """A result with the rows of one before that were not measured again, if it is from the same device and versions.

    Every row keeps its ratio, which is to the bfloat16 of its own run, and its date.
    """
    result = {**result, "rows": [_dated(result["date"], row) for row in result["rows"]]}
    if before is None or any(before[k] != result[k] for k in ("device", "versions", "extra_channels")):
        return result

    def which(row: ModelRow) -> tuple[object, ...]:
        return row["scheme"], row["phase"], row["batch"], row["length"]

    new = {which(row) for row in result["rows"]}
    kept = [_dated(before["date"], row) for row in before["rows"] if which(row) not in new]
    schemes = list(dict.fromkeys([BASELINE_SCHEME, *(row["scheme"] for row in before["rows"] + result["rows"])]))
    rows = sorted(kept + result["rows"], key=lambda row: schemes.index(row["scheme"]))
    measured = {row["scheme"] for row in rows}
    skipped = [s for s in before["skipped"] + result["skipped"] if s["scheme"] not in measured]
    return {**result, "rows": rows, "skipped": list({s["scheme"]: s for s in skipped}.values())}


def _dated(date: str, row: ModelRow) -> ModelRow:
    """A row with a date, unless it has one."""
    dated: ModelRow = {"date": date, **row}
    return dated


def markdown(results: Mapping[str, ModelResult]) -> str:
    """Results of several models and devices, by their headings, as one page."""
    lines = [
        "# Whole models",
        "",
        "Written by `scripts/benchmark_model.py`. Milliseconds a prefill (sequences x tokens) or a decoded token (sequences",
        "x tokens in the cache), of the clock on the wall; in brackets the speed-up over bfloat16 in the same run. Weights",
        "are random. Bytes are what the device's allocator gave out for the model. A decoded token is what a call of",
        f"{DECODED_TOKENS} tokens takes longer than one of {SHORT_CALL_TOKENS}, for each token more; where marked with "
        f"{WHOLE_CALL}, a call of",
        f"{DECODED_TOKENS} divided by their number, launching it included.",
    ]
    for heading, result in results.items():
        rows = result["rows"]
        if not rows:
            continue
        cases = sorted({_case(row) for row in rows}, key=_order)
        lines += ["", f"## {heading}", "", f"{describe(result)}.", ""]
        lines.append("| scheme | GB | " + " | ".join(f"{c.phase} {c.batch} x {c.length}" for c in cases) + " |")
        lines.append("|---|---:" + "|---:" * len(cases) + "|")
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            own = {_case(row): row for row in rows if row["scheme"] == scheme}
            size = next(iter(own.values()))["device_bytes"] / 1e9
            lines.append(f"| `{scheme}` | {size:.2f} | " + " | ".join(_cell(own.get(case)) for case in cases) + " |")
        for skipped in result["skipped"]:
            lines += ["", f"`{skipped['scheme']}` left out: {skipped['why']}"]
    return "\n".join(lines) + "\n"


def profiles(results: Mapping[str, ModelResult]) -> str:
    """Where the time of each phase goes, for the case that most schemes have and each of these, as one page."""
    lines = [
        "# Where the time of whole models goes",
        "",
        "Written by `scripts/benchmark_model.py`: the GPU's kernels in one prefill, and in one decoded token, by its own",
        f"clock (CUPTI), the {LISTED_KERNELS} that take the longest. The floor of a prefill is what its products take "
        "at the rates",
        "that the same run measured for large ones; that of decoding, what it takes to read the weights and the filled",
        "cache.",
    ]
    for heading, result in results.items():
        rows = [row for row in result["rows"] if "kernels" in row]
        if rows:
            lines += ["", f"## {heading}", "", f"{describe(result)}.", *_ceilings(result["ceilings"])]
        for phase in ("prefill", "decode"):
            lines += _profiles([row for row in rows if row["phase"] == phase])
    return "\n".join(lines) + "\n"


def _ceilings(ceilings: dict[str, float]) -> list[str]:
    bf16, int8, copy = (ceilings[name] for name in ("bf16_tflops", "int8_tops", "copy_tb_per_s"))
    return [
        "",
        f"Measured in the last run: {bf16:.0f} TFLOP/s in bfloat16, {int8:.0f} TOPS in INT8, copies {copy:.2f} TB/s.",
    ]


def _profiles(rows: list[ModelRow]) -> list[str]:
    lines: list[str] = []
    of_cases = collections.Counter(_case(row) for row in rows)
    shown = max(sorted(of_cases, key=_order), key=of_cases.__getitem__, default=None)
    for row in rows:
        if _case(row) != shown:
            continue
        wall, least = row["milliseconds"], row.get("floor_milliseconds")
        device = row.get("device_milliseconds", float("nan"))
        lines += ["", f"### `{row['scheme']}`: {row['phase']} {row['batch']} x {row['length']}", ""]
        lines.append(
            f"{wall:.2f} ms by the clock on the wall, {device:.2f} ms in kernels"
            + (f", {least:.2f} ms the floor." if least else ".")
        )
        lines += ["", "| kernel | calls | microseconds | share |", "|---|---:|---:|---:|"]
        for k in row.get("kernels", ()):
            share = k["microseconds"] / device / 1e3
            lines.append(f"| {k['kernel']} | {k['calls']:.0f} | {k['microseconds']:.0f} | {share:.1%} |")
    return lines


def _case(row: ModelRow) -> Case:
    return Case(row["phase"], row["batch"], row["length"])


def _order(case: Case) -> tuple[object, ...]:
    return case.phase != "prefill", case.length, case.batch


def _cell(row: ModelRow | None) -> str:
    if row is None:
        return "-"
    ratio = f" ({row['ratio_to_bf16']:.2f} x)" if row["ratio_to_bf16"] and row["scheme"] != BASELINE_SCHEME else ""
    mark = WHOLE_CALL if row["phase"] == "decode" and "call_milliseconds" not in row else ""
    return f"{row['milliseconds']:.2f}{mark}{ratio}"
