"""Families beside Llama and OPT go through the whole library: conversion, evaluation, generation over windows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fqjax
from fqjax.checkpoint.hugging_face import load_hf
from fqjax.cli import main as cli
from tests.conftest import make_checkpoint
from tests.models import variants


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name", ["mistral-window", "qwen2-window", "qwen3-window", "mixtral-window", "qwen3-moe-mlp-only"]
)
def test_convert_and_eval(name, tmp_path):
    source, text = make_checkpoint(tmp_path / "source", name), tmp_path / "text.txt"
    text.write_text("return the list of values that the class holds " * 100)
    common = ("--calibration", text, "--samples", 2, "--window", 32)
    run("convert", source, tmp_path / "out", "--scheme", "flattenquant-w8a8", *common)
    found = {}
    for model in ("source", "out"):
        run("eval", tmp_path / model, "--text", text, "--window", 32, "--windows", 4, "--json", tmp_path / "found.json")
        found[model] = json.loads((tmp_path / "found.json").read_text())["perplexity"]
    assert found["source"] != found["out"] == pytest.approx(found["source"], rel=0.05)
    manifest = json.loads((tmp_path / "out" / "fqjax.json").read_text())
    assert manifest["architecture"]["name"] == variants.VARIANTS[name]["architectures"][0]
    layers = {path.split(".", 2)[2]: entry for path, entry in manifest["layers"].items()}
    experts = variants.VARIANTS[name].get("num_local_experts", variants.VARIANTS[name].get("num_experts", 0))
    mlps = [f"mlp.experts.{i}" for i in range(experts)] + ["mlp"] * (name == "qwen3-moe-mlp-only" or not experts)
    names = {f"{mlp}.{layer}" for mlp in mlps for layer in ("gate_up_proj", "down_proj")}
    assert set(layers) == {"self_attn.qkv_proj", "self_attn.o_proj"} | names
    assert (layers["self_attn.qkv_proj"]["bias"] is not None) == (name in ("qwen2-window", "qwen3-window"))
    assert (layers["self_attn.o_proj"]["bias"] is not None) == (name == "qwen3-window")


@pytest.mark.thorough
def test_a_batch_is_generated_within_each_sequence_s_window(tmp_path):
    """Prompts of different lengths, padded, longer and shorter than the window: what each whole sequence predicts."""
    model, _ = load_hf(variants.write_checkpoint(tmp_path, variants.VARIANTS["qwen3-window"]), jnp.float32)
    prompts = [[5, 9], [7], [20, 30, 40, 50, 60, 10, 12]]
    new = fqjax.generate(model, prompts, 6, eos_token_id=[])
    rows = np.zeros((3, 16), np.int32)
    for row, prompt, continuation in zip(rows, prompts, new, strict=True):
        row[: len(prompt) + 6] = [*prompt, *continuation]
    likeliest = np.argmax(jax.jit(lambda x: model(x))(rows), axis=-1)
    for row, prompt, continuation in zip(likeliest, prompts, new, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 5].tolist() == continuation.tolist()
