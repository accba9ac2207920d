import dataclasses
import json

import pytest

from fqjax.methods import GPTQ, Absmax, Allocation, Compensated, FlattenQuant, IntegerScale, RoundToNearest, SmoothQuant
from fqjax.presets import PRESETS, resolve_scheme
from fqjax.runtime.errors import InputError
from fqjax.runtime.overrides import keys_of
from fqjax.runtime.settings import check_field, defaults_of, hints_of
from fqjax.scheme import Rule, Scheme

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
    assert PRESETS["flattenquant"].method.allocation.int4_share == 0.4829


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
    ("setting", "part", "key", "value"),
    [
        ("int4_share=1.0", "allocation", "int4_share", 1.0),
        ("allocation.int4_share=1", "allocation", "int4_share", 1.0),
        ("selection=budget", "allocation", "selection", "budget"),
        ("alpha=none", "", "alpha", None),
        ("alpha=1", "", "alpha", 1.0),
        ("flatten_weights=false", "", "flatten_weights", False),
        ("threshold_rule=mean", "", "threshold_rule", "mean"),
        ("upstream=0.5", "rounding", "upstream", 0.5),
        ("damping=1", "rounding", "damping", 1.0),
        ("rounding=nearest", "rounding", "kind", "nearest"),
        ("activation_bits=8", "", "activation_bits", 8),
    ],
)
def test_a_key_is_looked_up_in_the_parts(setting, part, key, value):
    changed = PRESETS["flattenquant"].override([setting])
    found = getattr(getattr(changed.method, part) if part else changed.method, key)
    assert found == value and type(found) is type(value)
    assert changed.name == "flattenquant"


def test_a_scheme_has_settings_and_rules_of_its_own():
    changed = PRESETS["w4a8"].override(["sample_rows=64", "int8_head=true", r"int8_layers=layers\.0"])
    assert (changed.sample_rows, changed.head, changed.rules) == (64, "int8", (Rule(r"layers\.0", "int8"),))
    again = changed.override(["head=none", "int8_layers=down"])
    assert (again.head, again.rules) == (None, (Rule("down", "int8"),))
    assert again.override(["int8_layers="]) == PRESETS["w4a8"].override(["sample_rows=64"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["int4_share=0.5", "int4_share=0.5"], "--set int4_share=0.5: int4_share=0.5 sets the same"),
        (["int4_share=0.5", "allocation.int4_share=1"], "int4_share=1: int4_share=0.5 sets the same"),
        (["int8_head=true", "int8_head=false"], "head=none: head=int8 sets the same"),
        (["int8_head=true", "head=none"], "head=none: head=int8 sets the same"),
        (["rounding=gptq", "rounding=nearest"], "rounding=nearest: rounding=gptq sets the same"),
        (["int8_layers=a", "int8_layers=b"], r"int8_layers=b: int8_layers=a is set too; expected one, as a\|b"),
    ],
)
def test_a_key_that_is_set_twice(settings, message):
    with pytest.raises(InputError, match=message):
        PRESETS["flattenquant"].override(settings)


def test_the_kind_of_a_part_is_chosen_first_whatever_the_order():
    changed = PRESETS["w4a8-integer-scale"].override(["group_size=64", "damping=1", "weights=gptq"])
    assert changed.method == IntegerScale(weights=GPTQ(group_size=64, damping=1.0))
    # Together, as neither is a scheme by itself.
    assert PRESETS["flattenquant"].override(["selection=kl", "compression=0"]).method.allocation.selection == "kl"


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        ("bf16", ["head", "sample_rows"]),
        ("w4a8", ["group_size", "activation_bits", "int4_share", "selection", "compression", "equalize"]),
        ("w4a8-integer-scale-gptq", ["weights", "group_size", "damping", "amplifier", "folded"]),
    ],
)
def test_the_keys_of_a_scheme_are_those_that_mean_something(preset, keys):
    found = keys_of(PRESETS[preset])
    assert set(keys) <= set(found) and not {"name", "summary", "rules", "method", "alpha", "upstream"} & set(found)


def test_a_key_of_two_parts_has_to_be_dotted():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two(FlattenQuant):
        other: Compensated = dataclasses.field(default_factory=Compensated)

    scheme = Scheme("two", "", Two(rounding=Compensated()))
    with pytest.raises(
        InputError, match=r"--set damping=1: .*'damping'; expected one of .*rounding.damping, .*other.damping"
    ):
        scheme.override(["damping=1"])
    changed = scheme.override(["other.damping=1"]).method
    assert (changed.other.damping, changed.rounding.damping) == (1.0, 0.01)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("int4_share", "expected KEY=VALUE"),
        ("int4=1", "no setting 'int4'.*int4_share.*int8_head, int8_layers"),
        ("share=1", "no setting 'share'"),
        ("name=x", "no setting 'name'"),
        ("rules=x", "no setting 'rules'"),
        ("group_size=32", "'flattenquant' has no setting 'group_size'"),
        ("int4_share=half", "expected a number from 0 to 1"),
        ("int4_share=1.5", "from 0 to 1"),
        ("int4_share=nan", "from 0 to 1"),
        ("int4_share=true", "from 0 to 1"),
        ("max_expansion=0.5", "from 1 to 16"),
        ("max_expansion=inf", "from 1 to 16"),
        ("flatten_weights=perhaps", "true or false"),
        ("threshold_rule=median", "'tukey' or 'mean' or 'search'"),
        ("activation_bits=5", "expected 4 or 8"),
        ("compression=9", "from 0 to 4"),
        ("damping=0", "above 0"),
        ("rounding=up", "rounding=up: expected nearest or gptq"),
        ("sample_rows=2.5", "a whole number"),
        ("alpha=some", "expected a number from 0 to 1 or none"),
        ("alpha=\u0660.\u0665", "expected a number from 0 to 1 or none"),
        ("sample_rows=\u0663", "expected a whole number"),
        ("int8_head=perhaps", "int8_head=perhaps: expected true or false"),
        ("head=int4", "head=int4: expected 'int8' or none"),
        ("int8_layers=(", "not a regular expression"),
        ("int8_layers=a{99999999999999}", "not a regular expression .the repetition number is too large"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(InputError, match=message) as caught:
        PRESETS["flattenquant"].override([setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "setting", "message"),
    [
        ("smoothquant", "group_size=32", "no setting 'group_size'"),
        ("smoothquant", "compression=3", "compression=3.0: only the selection 'budget'"),
        ("w4a8", "alpha=0.9", "no setting 'alpha'"),
        ("w4a8", "amplifier=4", "no setting 'amplifier'"),
        ("w4a8-gptq", "upstream=0.5", "no setting 'upstream'"),
        ("w4a8-integer-scale-folded", "amplifier=1024", "--set amplifier=1024: folded scales"),
        ("w4a8-integer-scale-folded", "amplifier=512", "amplifier=512: folded scales"),
        ("flattenquant", "selection=kl", "compression=2.4: only the selection 'budget'"),
        ("flattenquant", "threshold_strength=1", "threshold_strength=1.0: thresholds of layers in INT4 are searched"),
        ("flattenquant-hopper", "upstream=0.3", "--set upstream=0.3: acts only where activations have 4 bits"),
        ("flattenquant-hopper", "upstream=0.5", "rounding.upstream=0.5: acts only where activations have 4 bits"),
        ("flattenquant-hopper", "flatten_weights=false", "flatten_weights=False: weights with a scale for every"),
        ("bf16", "sample_rows=64", "sample_rows=64: the scheme quantizes no layer"),
        ("bf16", "int8_layers=down", "the scheme quantizes no layer"),
    ],
)
def test_settings_that_mean_nothing_are_errors(preset, setting, message):
    with pytest.raises(InputError, match=message):
        PRESETS[preset].override([setting])


def test_what_is_no_setting_of_a_method_cannot_be_given_to_it():
    with pytest.raises(TypeError):
        SmoothQuant(group_size=32)  # pyright: ignore
    with pytest.raises(InputError, match="activation_bits=16"):
        IntegerScale(weights=RoundToNearest(activation_bits=16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme("mine", "", Absmax(), sample_rows="many"), "sample_rows=many: expected a whole number"),
        (lambda: Scheme("mine", "", "absmax"), "method=absmax: expected Method or none"),
        (lambda: Scheme("mine", "", Absmax(), rules=["down"]), r"rules\[0\]=down: expected Rule"),
        (lambda: Absmax(allocation=Compensated()), "allocation=.*: expected Allocation"),
        (lambda: FlattenQuant(rounding=None), "rounding=None: expected nearest or gptq"),
        (lambda: Rule("down", "int4"), "keep=int4: expected 'int8' or 'float'"),
        (lambda: Rule("down", SmoothQuant()), "'down': a method for some layers only is not supported"),
    ],
)
def test_values_of_the_wrong_type_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_defaults_are_of_their_types():
    classes = [Scheme, Rule, Allocation, Compensated]
    for preset in PRESETS.values():
        classes += [type(preset.method)] if preset.method else []
    for cls in classes:
        for name, default in defaults_of(cls).items():
            assert check_field(hints_of(cls)[name], default, name) == default


NAMES = ["a.up", "a.down", "b.down"]


def test_of_several_rules_the_first_wins():
    rules = (Rule(r"^a\.down", "int8"), Rule("down", "float"))
    scheme = dataclasses.replace(PRESETS["w4a8"], rules=rules)
    assert scheme.kept(NAMES) == {"a.down": "int8", "b.down": "float"}
    assert scheme.kept_in_int8(NAMES) == {"a.down"} == scheme.kept_in_int8(["a.down"])
    assert dataclasses.replace(scheme, rules=rules[::-1]).kept(NAMES) == {"a.down": "float", "b.down": "float"}
    with pytest.raises(InputError, match="int8_layers=nowhere: found in the path of no linear layer"):
        dataclasses.replace(scheme, rules=(*rules, Rule("nowhere", "int8"))).kept(NAMES)


def test_schemes_survive_json():
    for preset in PRESETS.values():
        again = Scheme.from_json(json.loads(preset.recipe()))
        assert again == preset and hash(again) == hash(preset) and type(again.method) is type(preset.method)
    ruled = PRESETS["flattenquant"].override(["int8_layers=down", "int8_head=1", "alpha=1"])
    assert Scheme.from_json(json.loads(ruled.recipe())) == ruled


def test_equal_schemes_hash_alike():
    first, second = (PRESETS["flattenquant"].override(["alpha=1", "damping=1"]) for _ in range(2))
    assert first is not second and first == second and hash(first) == hash(second)
    assert first == PRESETS["flattenquant"].override(["damping=1.0", "alpha=1.0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"kind": "magic"}}, "unknown method 'magic'; the methods are: absmax, "),
        ({"method": {"alpha": 1}}, "expected an object with an entry 'kind', one of absmax"),
        ({"method": {"kind": "absmax", "alpha": 1}}, "absmax: unknown entry 'alpha'; expected some of activation"),
        (
            {"method": {"kind": "flattenquant", "rounding": {"kind": "up"}}},
            "rounding: unknown kind 'up'; expected near",
        ),
        ({"method": {"kind": "absmax", "equalize": 1}}, "equalize=1: expected true or false"),
        ({"method": "absmax"}, "method=absmax: expected Method or none"),
        ({"rules": [{"pattern": "x"}]}, "Rule: no entry 'keep'"),
        ({"rules": "x"}, "rules=x: expected a list"),
        ({"future": 1}, "Scheme: unknown entry 'future'"),
    ],
)
def test_records_of_schemes_that_are_wrong_are_refused(change, message):
    record = PRESETS["w8a8"].to_json() | change
    with pytest.raises(InputError, match=f"^recipe: .*{message}"):
        Scheme.from_json(record, "recipe")


@pytest.mark.parametrize(
    ("typo", "meant"), [("w4a8-gtpq", "w4a8-gptq"), ("flatenquant", "flattenquant"), ("zzz", None)]
)
def test_a_misspelt_scheme_is_told_the_nearest_name(typo, meant):
    with pytest.raises(InputError, match=f"unknown scheme '{typo}'; the schemes are: ") as caught:
        resolve_scheme(typo)
    assert str(caught.value).endswith(f"did you mean {meant!r}?") if meant else "did you mean" not in str(caught.value)
