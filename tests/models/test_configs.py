"""Configurations that a family's code does not cover are refused before any weight is read."""

import dataclasses
import json

import pytest

from fqjax.checkpoint.architecture import read_architecture
from fqjax.models import FAMILIES
from fqjax.runtime.errors import InputError
from tests.models import variants

FULL, SLIDING = "full_attention", "sliding_attention"


def read(directory, name, **changes):
    """Reads a variant's configuration with some entries changed, or left out where None is given."""
    config = {key: value for key, value in (variants.VARIANTS[name] | changes).items() if value is not None}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)[1]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4: expected a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0: expected a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: expected a whole number"),
        ({"intermediate_size": -80}, "intermediate_size -80: expected a whole number"),
        ({"head_dim": 11}, "head_dim.*11"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps 0.0: expected a (finite )?number above 0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
    ],
)
def test_entries_that_all_decoders_refuse(tmp_path, name, changes, message):
    refused(tmp_path, name, changes, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen2",
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size 48: expected a multiple of num_at",
        ),
        ("qwen2", {"layer_types": [FULL, "chunked_attention"]}, "'chunked_attention' is not supported; expected 'full"),
        ("qwen2", {"layer_types": [FULL, SLIDING]}, "layer_types has 'sliding_attention': expected sliding_window to"),
        ("qwen3-window", {"layer_types": [FULL]}, "layer_types"),
        ("qwen3-window", {"sliding_window": 0}, "sliding_window 0: expected a whole number"),
        ("mistral-window", {"sliding_window": -4}, "sliding_window -4: expected a whole number"),
        ("mistral-window", {"layer_types": [FULL, SLIDING]}, "layer_types of Mistral with sliding_window 5: expected"),
        (
            "opt",
            {"activation_function": "silu"},
            "activation_function 'silu' is not supported; expected 'relu', 'gelu'",
        ),
        ("opt", {"num_attention_heads": 5}, "hidden_size 48: expected a multiple of num_attention_heads 5"),
        ("opt", {"ffn_dim": 0}, "ffn_dim 0: expected a whole number"),
        (
            "mixtral",
            {"num_local_experts": 1 << 20},
            "num_experts 1048576: expected a whole number from 1 to 1024",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts 0: expected a whole number"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5: expected 4 at most, as num_local_experts"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok 0: expected a whole number"),
        ("mixtral", {"layer_types": [FULL, SLIDING]}, "layer_types"),
        ("qwen3-moe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7: expected 6 at most, as num_"),
        ("qwen3-moe", {"moe_intermediate_size": 0}, "moe_intermediate_size 0: expected a whole number"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0: expected a whole number"),
        ("qwen3-moe", {"mlp_only_layers": [2]}, "mlp_only_layers has 2: expected numbers of layers"),
    ],
)
def test_entries_that_a_family_refuses(tmp_path, name, changes, message):
    refused(tmp_path, name, changes, message)


def refused(directory, name, changes, message):
    with pytest.raises(InputError, match=f"config.json.*{message}") as caught:
        read(directory, name, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "windows"),
    [
        ("llama", {}, [None, None]),
        ("mistral-window", {}, [5, 5]),
        ("mistral-window", {"layer_types": [SLIDING, SLIDING]}, [5, 5]),
        ("qwen2", {"sliding_window": 5}, [None, None]),
        ("qwen2-window", {}, [None, 5]),
        ("qwen2-window", {"max_window_layers": 2}, [None, None]),
        ("qwen2-window", {"max_window_layers": 0}, [5, 5]),
        ("qwen2-window", {"layer_types": [SLIDING, FULL]}, [5, None]),
        ("qwen3-window", {}, [3, None]),
    ],
)
def test_layers_that_slide(tmp_path, name, changes, windows):
    config = read(tmp_path, name, **changes)
    assert [config.window(layer) for layer in range(2)] == windows


def test_a_configuration_has_a_type_for_each_layer(tmp_path):
    config = read(tmp_path, "qwen3-window")
    with pytest.raises(ValueError, match="layer_types has 1 entries for 2 layers"):
        dataclasses.replace(config, layer_types=(FULL,))


def test_a_configuration_as_an_older_transformers_writes_it():
    """Without what ``AutoConfig`` adds: ``layer_types``, ``head_dim``, ``rope_parameters``."""
    old = variants.VARIANTS["qwen2-window"] | {"hidden_act": "silu", "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = FAMILIES["Qwen2ForCausalLM"].config_from_hf(old)
    assert config.layer_types == (FULL, SLIDING) and config.head_dim == 12 and config.rope_theta == 10000.0
    assert dict(config.rope_scaling) == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "GPT2LMHeadModel"])
def test_other_architectures_are_answered_with_the_supported_ones(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} is not supported; supported are {', '.join(FAMILIES)}"):
        read(tmp_path, "llama", architectures=[name])
    assert list(FAMILIES)[:4] == [f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")]


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("scaling", [SCALED, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_the_length_before_scaling_may_stand_at_the_top(tmp_path, scaling, place):
    name = "original_max_position_embeddings"
    inside = read(tmp_path / "inside", "llama", **{place: scaling | {name: 16}})
    beside = read(tmp_path / "beside", "llama", **{place: scaling, name: 16})
    both = read(tmp_path / "both", "llama", **{place: scaling | {name: 16}, name: 16})
    assert inside == beside == both and dict(inside.rope_scaling)[name] == 16
    assert dict(read(tmp_path / "neither", "llama", **{place: scaling}).rope_scaling)[name] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": SCALED | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16},
            "original_max_position_embeddings: 16 and 32; expected one value",
        ),
        (
            {"rope_scaling": SCALED, "rope_parameters": SCALED | {"factor": 4.0}},
            "factor of rope_parameters and rope_scaling: 4.0 and 8.0",
        ),
        (
            {"rope_scaling": SCALED, "rope_parameters": {"rope_theta": 1e4}},
            "factor of rope_parameters and rope_scaling",
        ),
        ({"rope_scaling": SCALED | {"type": "yarn"}}, "rope_type and type: 'llama3' and 'yarn'"),
        ({"rope_scaling": {"factor": 8.0}}, "factor 8.0 without a rope_type that scales"),
        ({"rope_scaling": SCALED, "original_max_position_embeddings": "16"}, "original_max_position_embeddings '16'"),
        ({"rope_scaling": SCALED, "original_max_position_embeddings": 0}, "original_max_position_embeddings 0"),
    ],
)
def test_scalings_that_contradict_each_other(tmp_path, changes, message):
    with pytest.raises(InputError) as caught:
        read(tmp_path, "llama", **changes)
    assert message in str(caught.value)


def test_the_same_scaling_in_two_places_is_one(tmp_path):
    old = {key if key != "rope_type" else "type": value for key, value in SCALED.items()}
    once = read(tmp_path / "once", "llama", rope_scaling=SCALED)
    assert read(tmp_path / "twice", "llama", rope_scaling=old, rope_parameters=SCALED | {"rope_theta": 1e4}) == once


def test_two_values_of_theta_are_said(tmp_path, caplog):
    config = read(tmp_path, "llama", rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert config.rope_theta == 5e5 and "rope_theta is 500000.0 and 10000.0; the first" in caplog.text
