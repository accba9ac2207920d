import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fqjax.core.selection import select_low_bits

LAYERS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(layers=LAYERS, share=st.floats(0, 1))
def test_the_share_is_reached_and_no_chosen_layer_is_dispensable(layers, share):
    errors, macs = [e for e, _ in layers], [m for _, m in layers]
    chosen = select_low_bits(errors, macs, share)
    total = sum(m for m, low in zip(macs, chosen, strict=True) if low)
    assert total >= share * sum(macs)
    assert all(total - m < share * sum(macs) for m, low in zip(macs, chosen, strict=True) if low)


def test_the_least_sensitive_layers_are_chosen():
    assert select_low_bits([0.5, 0.1, 0.9, 0.2], [10, 10, 10, 10], 0.5) == [False, True, False, True]


@pytest.mark.parametrize(("share", "expected"), [(0.0, False), (1.0, True)])
def test_the_ends(share, expected):
    assert select_low_bits([0.3, 0.0], [1, 5], share) == [expected] * 2


def test_sensitivity_counts_by_arithmetic():
    assert select_low_bits([0.2, 0.3], [10, 100], 0.5) == [False, True]
