"""Rows of layers that are alike, put together."""

from fqjax.report.grouping import Figure, Row, grouped


def experts(blocks, count, error=lambda block, expert: 0.01):
    for block in range(blocks):
        yield Row.of(f"layers.{block}.self_attn.qkv_proj", ("4",), (Figure.of(0.5, "50%"),))
        for expert in range(count):
            value = error(block, expert)
            path = f"layers.{block}.mlp.experts.{expert}.gate_up_proj"
            yield Row.of(path, ("4",), (Figure.of(value, f"{value:.0%}"),))


def labels(rows):
    return [(row.label, *(figure.text for figure in row.figures)) for row in rows]


def test_few_rows_stay_as_they_are():
    rows = list(experts(2, 3))
    assert grouped(rows) == rows and rows[1].label == "layers.0.mlp.experts.0.gate_up_proj"


def test_layers_alike_share_a_row():
    assert labels(grouped(experts(48, 128))) == [
        ("layers.0-47.self_attn.qkv_proj", "50%"),
        ("layers.0-47.mlp.experts.0-127.gate_up_proj", "1%"),
    ]


def test_experts_with_different_figures_are_put_together_before_blocks():
    found = labels(grouped(experts(4, 32, lambda block, expert: 0.01 * (expert + 1))))
    assert (
        found[:2]
        == [
            ("layers.0-3.self_attn.qkv_proj", "50%"),
            ("layers.0-3.mlp.experts.0.gate_up_proj", "1%"),
        ]
        and len(found) == 33
    )
    found = labels(grouped(experts(4, 32, lambda block, expert: 0.01 * (4 * expert + block + 1))))
    assert found[1] == ("layers.0.mlp.experts.0-31.gate_up_proj", "1%-125%") and len(found) == 5


def test_many_blocks_with_different_figures_are_put_together():
    found = labels(grouped(experts(100, 2, lambda block, expert: 0.01 * (block + 1))))
    assert found == [
        ("layers.0-99.self_attn.qkv_proj", "50%"),
        ("layers.0-99.mlp.experts.0-1.gate_up_proj", "1%-100%"),
    ]


def test_what_differs_in_kind_or_does_not_follow_is_kept_apart():
    rows = [Row.of(f"layers.{i}.proj", ("8" if i == 50 else "4",)) for i in range(100) if i != 70]
    assert [row.label for row in grouped(rows)] == [
        "layers.0-49.proj", "layers.50.proj", "layers.51-69.proj", "layers.71-99.proj"
    ]  # fmt: skip


def test_names_without_numbers_are_taken_as_they_are():
    assert [row.label for row in grouped([Row.of("lm_head", ()), Row.of("a%b", ()), Row.of("fc1", ())], 0)] == [
        "lm_head", "a%b", "fc1"
    ]  # fmt: skip
