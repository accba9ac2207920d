"""Every family's table of sites fits its modules."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.hugging_face import abstract_model
from fqjax.layers.experts import Expert, MixtureOfExperts
from fqjax.layers.surgery import dotted, find_linears
from fqjax.models.chain import chain
from fqjax.models.sites import Norm, Rows, Site, Stream, reading_alike, sites_of
from fqjax.rewrites.equalize import rescale
from tests.models import variants


def abstract(name, directory):
    """A variant's model with shapes in place of arrays."""
    (directory / "config.json").write_text(json.dumps(variants.VARIANTS[name]))
    return abstract_model(*read_architecture(directory), jnp.bfloat16)


@pytest.fixture(params=variants.VARIANTS)
def model(request, tmp_path):
    return abstract(request.param, tmp_path)


def test_every_linear_layer_reads_at_one_site(model):
    readers = Counter(name for site in model.sites() for name in site.consumers)
    assert readers == Counter(list(find_linears(model)))


def test_producers_are_there_and_fit(model):
    linears = find_linears(model)
    modules = {dotted(path): node for path, node in nnx.iter_graph(model)}
    for site in model.sites():
        widths = {linears[name].in_features for name in site.consumers}
        assert len(widths) == 1, site
        if isinstance(site.producer, Norm):
            assert modules[site.producer.path].scale.shape == tuple(widths)
        if isinstance(site.producer, Rows):
            rows = site.producer.rows
            assert rows.shape == tuple(widths)
            assert 0 <= rows.min() <= rows.max() < linears[site.producer.path].out_features
        if site.heads is not None:
            assert site.heads.query * site.heads.dim == widths.pop()
            channels = rows.reshape(site.heads.query, site.heads.dim)
            assert len(np.unique(channels[:, 0])) == site.heads.key_value


def test_a_site_below_a_block_has_the_block_s_names(model):
    names = set(find_linears(model.layers[1]))
    inside = [site.below("layers.1.") for site in model.sites() if site.consumers[0].startswith("layers.1.")]
    assert {name for site in inside for name in site.consumers} == names
    assert all(site.producer.path in names for site in inside if isinstance(site.producer, Rows))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama-grouped", [Norm, Rows, Norm, Rows]),
        ("qwen3-moe", [Norm, Rows, Norm, *[Rows] * 6]),
        ("opt", [Norm, Rows, Norm, Rows]),
        ("opt-gelu", [Norm, Rows, Norm, type(None)]),
        ("opt-350m", [Stream, Rows, Stream, Rows]),
        ("opt-plain-norms", [type(None), Rows, type(None), Rows]),
    ],
)
def test_kinds_of_producers(name, kinds, tmp_path):
    sites = [site for site in abstract(name, tmp_path).sites() if site.consumers[0].startswith("layers.1.")]
    assert [type(site.producer) for site in sites] == kinds


class Mixed(nnx.Module):
    """A model of one's own that gives no table."""

    def __init__(self, rngs):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, rngs=rngs)

        self.first = linear(8, 8)
        experts = [Expert(linear(8, 12), linear(6, 8)) for _ in range(3)]
        self.mlp = MixtureOfExperts(linear(8, 3), experts, 2, normalized=True)


def test_a_model_without_a_table_has_a_site_a_layer_but_for_experts():
    model = Mixed(nnx.Rngs(0))
    sites = sites_of(model)
    together = tuple(f"mlp.experts.{i}.gate_up_proj" for i in range(3))
    assert Site(together) in sites
    assert Counter(name for site in sites for name in site.consumers) == Counter(list(find_linears(model)))
    assert all(site.producer is None for site in sites)
    assert chain(model, ["first"]).sites == sites
    names = ["mlp.experts.1.gate_up_proj", "first", "mlp.experts.0.gate_up_proj"]
    assert reading_alike(sites, names) == [(names[0], names[2]), ("first",)]
    assert reading_alike([], names) == [(name,) for name in names]


def test_all_that_read_a_producer_s_rows_are_rescaled_with_it():
    up, left, right = (nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3))
    up.kernel[...] = up.kernel[...] * jnp.array([1.0, 64, 1, 1])
    x = jax.random.normal(jax.random.key(0), (5, 4))
    before = left(up(x)), right(up(x))
    rescale(
        {"up": up, "left": left, "right": right},
        [Site(("left", "right"), Rows("up", np.arange(4))), Site(("up",), Norm("norm")), Site(("other",), Stream())],
    )
    assert np.ptp(np.log2(np.abs(up.kernel[...]).max(axis=0))) < 2
    np.testing.assert_allclose((left(up(x)), right(up(x))), before, rtol=1e-4, atol=1e-5)
