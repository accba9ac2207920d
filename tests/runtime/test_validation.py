import dataclasses
import json
import math
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le
from hypothesis import given
from hypothesis import strategies as st

from fqjax.runtime.errors import InputError
from fqjax.runtime.validation import Finite, Positive, Scalar, Size, check_given, check_value, validated


@dataclasses.dataclass(frozen=True)
class Inner:
    bits: Literal[4, 8] = 8
    rank: Annotated[int, Ge(1)] = 1


@dataclasses.dataclass(frozen=True)
class Other:
    width: Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    size: Size
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    eps: Positive = 1e-6
    plain: float = 0.0
    finite: Finite = 0.0
    name: str | None = None
    flag: bool = False
    ids: tuple[int, ...] = ()
    pairs: tuple[tuple[str, Scalar], ...] = ()
    extra: dict = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    either: Inner | Other | None = None
    inners: tuple[Inner, ...] = ()

    def __post_init__(self) -> None:
        if self.name == "odd":
            raise InputError("name=odd: expected an even one")


def test_entries_become_fields_with_tuples_for_lists_dataclasses_for_objects_and_floats_for_whole_numbers():
    entries = {
        "size": 3,
        "plain": 2,
        "ids": [1, 2],
        "pairs": [["a", 1], ["b", True], ["c", 0.5], ["d", None]],
        "extra": {"x": [1, {"y": None}]},
        "inner": {"bits": 4},
        "either": {"width": 7},
        "inners": [{}, {"rank": 2}],
    }
    found = validated(Outer, entries, "f")
    pairs = (("a", 1), ("b", True), ("c", 0.5), ("d", None))
    wanted = Outer(
        size=3, plain=2.0, ids=(1, 2), pairs=pairs, extra=entries["extra"], inner=Inner(4), either=Other(7),
        inners=(Inner(), Inner(8, 2)),
    )  # fmt: skip
    assert found == wanted and type(found.plain) is float and type(found.pairs[1][1]) is bool
    assert validated(Outer, dataclasses.asdict(wanted), "f") == wanted  # With tuples in place of lists.


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "f: no entry 'size'; expected a whole number from 1 to 16777216"),
    ({"size": 0}, "f: size 0: expected a whole number from 1 to 16777216"),
    ({"size": True}, "f: size True: expected a whole number from 1 to 16777216"),
    ({"size": 1.0}, "f: size 1.0: expected a whole number from 1 to 16777216"),
    ({"size": "1"}, "f: size '1': expected a whole number from 1 to 16777216"),
    ({"size": 10**400}, "f: size too large a number: expected a whole number from 1 to 16777216"),
    ({"share": 1.5}, "f: share 1.5: expected a number from 0 to 1"),
    ({"share": "half"}, "f: share 'half': expected a number from 0 to 1"),
    ({"eps": 0}, "f: eps 0: expected a finite number above 0"),
    ({"plain": True}, "f: plain True: expected a number"),
    ({"plain": math.nan}, "f: plain nan: expected a number"),
    ({"finite": math.inf}, "f: finite inf: expected a finite number"),
    ({"finite": 10**40}, "f: finite too large a number: expected a finite number"),
    ({"name": 3}, "f: name 3: expected text or null"),
    ({"flag": 1}, "f: flag 1: expected true or false"),
    ({"ids": ["a"]}, "f: ids ['a']: expected a list, each a whole number"),
    ({"pairs": [["a", {}]]}, "f: pairs [['a', {}]]: expected a list"),
    ({"extra": 3}, "f: extra 3: expected an object"),
    ({"inner": {"bits": 5}}, "f: inner.bits 5: expected 4 or 8"),
    ({"inner": {"rank": 0}}, "f: inner.rank 0: expected a whole number of at least 1"),
    ({"inner": {"bit": 4}}, "f: inner: unknown entry 'bit'; expected some of bits, rank"),
    ({"inner": 4}, "f: inner 4: expected an object or null"),
    ({"inners": [{}, {"bits": 3}]}, "f: inners[1].bits 3: expected 4 or 8"),
    ({"inners": [3]}, "f: inners[0] 3: expected an object"),
    ({"name": "odd"}, "f: name=odd: expected an even one"),
    ({"name": {1, 2}}, "f: value is not valid JSON (Object of type set is not JSON serializable)"),
    ({"name": "x" * 99 + "\ud800", "flag": 3}, "f: value is not valid JSON"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED)
def test_errors_name_the_entry_its_value_and_what_was_expected(entries, message):
    with pytest.raises(InputError) as error:
        validated(Outer, {"size": 1} | entries if entries else {}, "f")
    assert str(error.value).startswith(message) and str(error.value).count("\n") == 0


def test_unknown_entries_are_refused_with_those_there_are():
    with pytest.raises(InputError, match="^f: unknown entry 'wide'; expected some of either, eps, extra, finite, flag"):
        validated(Outer, {"size": 1, "wide": 2}, "f")


def test_a_single_value_is_checked_under_its_name():
    assert check_value(tuple[int, ...], [1, 2], "f", "ids") == (1, 2)
    with pytest.raises(InputError, match=r"^f: factor 2: expected a finite number above 2$"):
        check_value(Annotated[Finite, Gt(2)], 2, "f", "factor")
    with pytest.raises(InputError, match=r"^f: 3: expected an object$"):
        check_value(dict, 3, "f", "")


def test_given_entries_may_be_absent_null_or_unknown_but_not_wrong():
    check_given(Outer, {"size": None, "ids": 3, "unknown": object()}, "f")
    with pytest.raises(InputError, match="^f: size 0: expected a whole number"):
        check_given(Outer, {"size": 0}, "f")


TEXT = st.text(st.sampled_from("ab\n\ud800"), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(Outer)]), JSON))
def test_any_json_is_an_instance_or_an_error_of_one_line(entries):
    try:
        found = validated(Outer, entries, "f")
    except InputError as error:
        assert str(error).startswith("f: ") and str(error).isprintable()
    else:
        assert json.loads(json.dumps(dataclasses.asdict(found))).items() >= entries.items()


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_exactly(value):
    assert validated(Outer, {"size": 1, "plain": value}, "f").plain == value
