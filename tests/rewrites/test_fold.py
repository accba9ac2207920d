"""Whether a scheme can be exported, known before anything is quantized."""

import jax.numpy as jnp
import pytest

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import abstract_model
from fqjax.layers.surgery import select_linears
from fqjax.models.sites import sites_of
from fqjax.presets import PRESETS
from fqjax.rewrites.fold import UNSMOOTHED, folding_obstacle
from tests.models import variants


def obstacle(folder, variant, scheme, ignore=()):
    """Of a scheme for a variant, of which only the configuration is read."""
    directory = variants.write_checkpoint(folder, variants.VARIANTS[variant])
    model = abstract_model(*read_architecture(directory), jnp.bfloat16)
    return scheme.export_obstacle(folding_obstacle(sites_of(model), select_linears(model, ignore).linears))


def test_presets_that_are_named_in_refusals_are_those_that_can_always_be_exported():
    always = {
        name for name, scheme in PRESETS.items() if scheme.export_obstacle() is None and not scheme.method.smooths
    }
    first, others = UNSMOOTHED.split("; ")
    plain = others.removesuffix(", each plain or with -gptq").replace(" or ", ", ").split(", ")
    assert always == {first, *plain, *(f"{name}-gptq" for name in plain)}


@pytest.mark.parametrize(
    ("preset", "settings", "reason"),
    [
        ("bf16", [], "nothing is quantized"),
        ("flattenquant", [], "flattens channels"),
        ("flattenquant-hopper", [], "flattens channels"),
        ("flattenquant", ["flatten_activations=false", "flatten_weights=false"], "activations have 4 bits"),
        ("flattenquant-hopper", ["flatten_activations=false"], None),
        ("flattenquant-w8a8", ["max_expansion=1"], None),
        ("w8a8", ["int4_share=0.5"], "activations have 4 bits"),
        ("w8a8", ["int8_head=true"], "output head is in INT8"),
        ("w4a16-gptq", [], None),
    ],
)
def test_what_stands_in_the_way_by_the_settings(preset, settings, reason):
    found = PRESETS[preset].override(settings).export_obstacle()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("preset", ["smoothquant", "w4a8-awq", "w4a8-integer-scale-awq"])
@pytest.mark.parametrize(
    ("variant", "ignore", "reason"),
    [
        ("llama-grouped", [], "layers.0.self_attn.o_proj: smoothing differs between heads that share a value head"),
        ("llama-grouped", ["o_proj"], None),
        ("llama", [], None),
        ("opt", [], None),
        ("opt-350m", [], "smoothing cannot be folded"),
        ("mixtral", [], "layers.0."),
    ],
)
def test_what_stands_in_the_way_in_a_model(tmp_path, preset, variant, ignore, reason):
    found = obstacle(tmp_path / "model", variant, PRESETS[preset], ignore)
    assert found is None if reason is None else reason in found


def test_without_smoothing_no_model_stands_in_the_way(tmp_path):
    assert obstacle(tmp_path / "model", "opt-350m", PRESETS["smoothquant"].override(["alpha=none"])) is None
