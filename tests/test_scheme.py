import dataclasses
import json

import pytest

from fqjax.runtime.errors import InputError
from fqjax.scheme import PRESETS, Scheme, resolve_scheme

METHODS = ("", "-gptq", "-awq")
GROUPED = ("w4a8", "w4a8-integer-scale", "w4a8-integer-scale-folded", "w4a16")


def test_presets_carry_their_own_names_and_a_line_on_each():
    assert list(PRESETS) == [
        "bf16",
        "w8a8",
        "smoothquant",
        "flattenquant",
        "flattenquant-w4a4",
        "flattenquant-w8a8",
        "flattenquant-hopper",
        "flattenquant-hopper-int4",
        *(f"{kind}{method}" for kind in GROUPED for method in METHODS),
    ]
    assert all(preset.name == name and len(preset.summary) > 20 for name, preset in PRESETS.items())


def test_the_published_share_is_the_default_one():
    assert PRESETS["flattenquant"].int4_share == 0.4829


def test_naive_presets_make_up_for_nothing_or_spare_no_layer_from_int4():
    assert {name for name, preset in PRESETS.items() if preset.naive} == {"w8a8", "flattenquant-w4a4", *GROUPED}
    whole = PRESETS["flattenquant"].override(["int4_share=1.0"])
    assert whole.naive and not whole.override(["int8_layers=down_proj"]).naive


def test_schemes_resolve_by_name_or_are_themselves():
    assert resolve_scheme("w8a8") is PRESETS["w8a8"]
    assert resolve_scheme(PRESETS["w8a8"]) is PRESETS["w8a8"]
    with pytest.raises(InputError, match="'w3'.*bf16, w8a8"):
        resolve_scheme("w3")


@pytest.mark.parametrize(
    ("setting", "key", "value"),
    [
        ("int4_share=1.0", "int4_share", 1.0),
        ("alpha=none", "alpha", None),
        ("alpha=1", "alpha", 1.0),
        ("flatten_weights=false", "flatten_weights", False),
        ("threshold_rule=mean", "threshold_rule", "mean"),
        ("sample_rows=64", "sample_rows", 64),
    ],
)
def test_any_field_can_be_overridden(setting, key, value):
    assert getattr(PRESETS["flattenquant"].override([setting]), key) == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("int4_share", "expected KEY=VALUE"),
        ("int4=1", "no field 'int4'.*int4_share"),
        ("name=x", "no field 'name'"),
        ("int4_share=half", "expected a number"),
        ("int4_share=1.5", "from 0 to 1"),
        ("int4_share=nan", "from 0 to 1"),
        ("max_expansion=0.5", "from 1 to 16"),
        ("flatten_weights=perhaps", "true or false"),
        ("threshold_rule=median", "tukey or mean or search"),
        ("int4_activation_bits=5", "expected 4, 8 or 16"),
        ("compression=9", "from 0 to 4"),
        ("rounding=up", "nearest or gptq"),
        ("sample_rows=2.5", "a whole number"),
        ("method=magic", "none or absmax"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(InputError, match=message):
        PRESETS["flattenquant"].override([setting])


def test_a_scheme_of_the_wrong_type_is_refused():
    with pytest.raises(InputError, match="sample_rows"):
        Scheme(name="mine", method="absmax", sample_rows="many")  # pyright: ignore


def test_schemes_survive_json():
    for preset in PRESETS.values():
        assert Scheme(**json.loads(json.dumps(dataclasses.asdict(preset)))) == preset
