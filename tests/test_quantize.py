"""``quantize`` on any NNX module: the user's own, nested, shared, called several times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fqjax
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.record import Record
from fqjax.layers.stacked import quantized_layers
from fqjax.runtime.errors import InputError


class MLP(nnx.Module):
    """Linears in an attribute, a list, a dictionary and a sequence, with dropout."""

    def __init__(self, rngs):
        self.first = nnx.Linear(24, 32, rngs=rngs)
        self.middle = nnx.List([nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, use_bias=False, rngs=rngs)])
        self.named = nnx.Dict({"a": nnx.Linear(32, 32, rngs=rngs)})
        self.tail = nnx.Sequential(nnx.Linear(32, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 8, rngs=rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.first(x)))
        for layer in self.middle:
            x = x + nnx.relu(layer(x))
        x = self.dropout(self.named["a"](x))
        return self.head(self.tail(x))


class Repeated(nnx.Module):
    """One layer called three times, and reached by two names."""

    def __init__(self, rngs):
        self.block = nnx.Linear(16, 16, rngs=rngs)
        self.same = self.block
        self.out = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.block(x))
        return self.out(jnp.tanh(self.same(jnp.tanh(self.block(x)))))


@pytest.fixture
def mlp():
    return MLP(nnx.Rngs(0))


def batches(width=24, count=3, rows=20):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, width)), jnp.float32) for _ in range(count)]


def outputs(model, x):
    return np.asarray(nnx.view(model, deterministic=True, raise_if_not_found=False)(x))


SCHEMES = ["w8a8", "smoothquant", "flattenquant", "flattenquant-w8a8"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_layer_becomes_an_integer_one(mlp, scheme):
    quantized, report = fqjax.quantize(mlp, scheme, batches())
    assert type(quantized) is MLP
    assert set(quantized_layers(quantized)) == {
        "first", "middle.0", "middle.1", "named.a", "tail.layers.0", "tail.layers.2"
    }  # fmt: skip
    assert report.skipped == {"head": "an output head or router"}
    x = batches()[0]
    exact, approximate = outputs(mlp, x), outputs(quantized, x)
    tolerance = 0.3 if scheme == "flattenquant" else 0.03
    assert 0 < np.linalg.norm(approximate - exact) < tolerance * np.linalg.norm(exact)


def test_every_product_is_one_of_integers(mlp):
    quantized, _ = fqjax.quantize(mlp, "flattenquant", batches(), ignore=["tail"])
    layer = quantized.middle[0]
    graph = jax.make_jaxpr(lambda x: layer(x))(jnp.ones((4, 32)))
    dots = [e for e in _equations(graph.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) == 1
    assert [v.aval.dtype for v in dots[0].invars] == [jnp.int8, jnp.int8]
    assert dots[0].outvars[0].aval.dtype == jnp.int32


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from _equations(value.jaxpr)


def test_the_model_given_is_left_as_it_was(mlp):
    before = jax.tree.map(lambda leaf: leaf.copy(), nnx.state(mlp, nnx.Param))
    fqjax.quantize(mlp, "flattenquant", batches())
    assert isinstance(mlp.first, nnx.Linear)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(mlp, nnx.Param))
    assert not mlp.dropout.deterministic


def test_changing_the_copy_leaves_the_model(mlp):
    quantized, _ = fqjax.quantize(mlp, "w8a8", batches())
    quantized.norm.scale[...] = jnp.zeros(32)
    assert np.asarray(mlp.norm.scale[...]).any()


def test_a_shared_layer_is_quantized_once_and_stays_shared():
    model = Repeated(nnx.Rngs(0))
    quantized, report = fqjax.quantize(model, "w8a8", batches(16))
    assert isinstance(quantized.block, QuantizedLinear) and quantized.same is quantized.block
    assert {row.name: row.macs for row in report.layers} == {"block": 3 * 256, "out": 256}
    x = batches(16)[0]
    np.testing.assert_allclose(outputs(quantized, x), outputs(model, x), atol=0.05)


def test_a_lone_linear_layer_is_a_model_too():
    model = nnx.Sequential(nnx.Linear(24, 5, rngs=nnx.Rngs(0)))
    quantized, _ = fqjax.quantize(model, "w8a8", batches())
    np.testing.assert_allclose(outputs(quantized, batches()[0]), outputs(model, batches()[0]), atol=0.1)


@pytest.mark.parametrize(
    "data",
    [
        lambda: iter(batches()),
        lambda: [(x,) for x in batches()],
        lambda: [{"x": x} for x in batches()],
        lambda: [np.asarray(x).tolist() for x in batches()],
    ],
    ids=["iterator", "tuples", "mappings", "lists"],
)
def test_calibration_takes_any_iterable_of_inputs(mlp, data):
    _, expected = fqjax.quantize(mlp, "w8a8", batches())
    _, report = fqjax.quantize(mlp, "w8a8", data())
    assert [row.relative_error for row in report.layers] == [row.relative_error for row in expected.layers]


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_outputs_have_the_dtype_they_had(dtype):
    model = nnx.Sequential(nnx.Linear(24, 8, dtype=dtype, rngs=nnx.Rngs(0)))
    quantized, _ = fqjax.quantize(model, "w8a8", batches())
    assert quantized(batches()[0]).dtype == model(batches()[0]).dtype


def test_the_quantized_model_works_with_nnx_and_jax_transformations(mlp):
    quantized, _ = fqjax.quantize(mlp.tail, "flattenquant", batches(32))
    x = batches(32)[0]
    expected = np.asarray(quantized(x))
    np.testing.assert_array_equal(nnx.jit(lambda model, x: model(x))(quantized, x), expected)
    graphdef, state = nnx.split(quantized)
    np.testing.assert_array_equal(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x), expected)
    np.testing.assert_allclose(jax.vmap(lambda row: quantized(row))(x), expected, rtol=1e-6)


def test_ignored_layers_stay_in_float(mlp):
    quantized, report = fqjax.quantize(mlp, "w8a8", batches(), ignore=[r"middle\.0", "^first$"])
    assert isinstance(quantized.first, nnx.Linear) and isinstance(quantized.middle[0], nnx.Linear)
    assert isinstance(quantized.middle[1], QuantizedLinear)
    assert {row.name for row in report.layers if row.bits == 8} == set(quantized_layers(quantized))


def test_the_share_of_int4_is_kept_and_reported(mlp):
    _, report = fqjax.quantize(mlp, "flattenquant", batches())
    assert report.int4_mac_share >= 0.4829
    low = sum(row.macs for row in report.layers if row.bits == 4)
    assert report.int4_mac_share == low / sum(row.macs for row in report.layers)
    assert {row.bits for row in report.layers} == {4, 8}


def test_bf16_returns_an_equal_model(mlp):
    same, report = fqjax.quantize(mlp, "bf16")
    assert not quantized_layers(same) and report.int4_mac_share == 0 and report.expansion == 1
    np.testing.assert_array_equal(outputs(same, batches()[0]), outputs(mlp, batches()[0]))


def test_bytes_count_what_lies_on_the_device(mlp):
    quantized, report = fqjax.quantize(mlp, "flattenquant", batches())
    layers = quantized_layers(quantized)
    for row in report.layers:
        assert row.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(layers[row.name], nnx.Not(Record))))
        codes, width = layers[row.name].weight.get_value().codes, 256 if row.bits == 4 else 128
        assert codes.nbytes == codes.shape[0] * width * row.bits // 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w4a2", batches()), "unknown scheme 'w4a2'.*flattenquant"),
        (("flattenquant", None), "needs calibration"),
        (("flattenquant", []), "no batch"),
        (("flattenquant", np.zeros((4, 24), np.float32)), "one array"),
    ],
)
def test_bad_arguments_are_named(mlp, arguments, message):
    with pytest.raises(InputError, match=message):
        fqjax.quantize(mlp, *arguments)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lm_head", "matches no linear layer"),
        ("(", "not a regular expression"),
        ("a{99999999999999}", "not a regular expression .the repetition number"),
        ("(" * 5000 + ")" * 5000, "not a regular expression .maximum recursion depth"),
    ],
    ids=["nowhere", "open", "repeated", "nested"],
)
def test_a_pattern_that_matches_nothing_is_an_error(mlp, pattern, message):
    with pytest.raises(InputError, match=message):
        fqjax.quantize(mlp, "w8a8", batches(), ignore=[pattern])


def test_a_weight_that_is_not_finite_is_refused(mlp):
    mlp.named["a"].kernel[...] = mlp.named["a"].kernel[...].at[3, 4].set(jnp.nan)
    with pytest.raises(InputError, match=r"named\.a"):
        fqjax.quantize(mlp, "w8a8", batches())


def test_an_activation_that_is_not_finite_is_refused(mlp):
    bad = batches()
    bad[1] = bad[1].at[0, 7].set(jnp.inf)
    with pytest.raises(InputError, match="first.*channel 7"):
        fqjax.quantize(mlp, "w8a8", bad)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="no nnx.Linear"):
        fqjax.quantize(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), "w8a8", batches())


def test_a_layer_that_is_never_called_is_named():
    class Lazy(MLP):
        def __call__(self, x):
            return self.head(self.tail(self.norm(self.first(x))))

    with pytest.raises(InputError, match=r"middle\.0.*never called"):
        fqjax.quantize(Lazy(nnx.Rngs(0)), "w8a8", batches())


def test_stacked_layers_are_refused_by_name():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Stacked(nnx.Module):
        def __init__(self):
            self.layers = make(jax.random.split(jax.random.key(0), 3))

    with pytest.raises(InputError, match="layers: its weight has shape"):
        fqjax.quantize(Stacked(), "w8a8", batches(8))


def test_a_layer_that_could_overflow_is_refused(monkeypatch, mlp):
    monkeypatch.setattr("fqjax.core.overflow.LIMIT", 1000)
    with pytest.raises(InputError, match="first: the int32 accumulator could reach"):
        fqjax.quantize(mlp, "w8a8", batches())


SPARING = {"w4a8": [], "w4a16": ["int4_share=0.4"], "flattenquant": [], "flattenquant-hopper": ["selection=kl"]}
SPARING |= {"flattenquant-hopper-int4": ["int4_share=0.45", "rounding=nearest"]}
"""Presets with what is changed of them, so that every selection is among them, and all of INT4 or some."""


@pytest.mark.parametrize("preset", SPARING)
def test_layers_can_be_kept_in_int8_and_the_share_of_int4_is_kept(preset):
    data = [jnp.asarray(np.random.default_rng(0).normal(size=(32, 24)), jnp.float32)]
    scheme = fqjax.PRESETS[preset].override([r"int8_layers=middle\.0|^tail", *SPARING[preset]])
    _, report = fqjax.quantize(MLP(nnx.Rngs(0)), scheme, data)
    bits = {row.name: row.bits for row in report.layers}
    kept = {name for name in bits if name.startswith(("middle.0", "tail"))}
    assert len(kept) == 3 and {bits[name] for name in kept} == {8}
    share = scheme.method.allocation.int4_share
    if share < 1:
        assert report.int4_mac_share >= share
    else:
        assert {bits[name] for name in set(bits) - kept} == {4}


def test_a_share_of_int4_that_layers_in_int8_put_out_of_reach_is_refused():
    data = [jnp.asarray(np.random.default_rng(0).normal(size=(32, 24)), jnp.float32)]
    scheme = fqjax.PRESETS["flattenquant-hopper"].override(["int8_layers=middle|^tail"])
    with pytest.raises(InputError, match=r"int4_share=0.4829: out of reach, as layers kept in INT8 leave 0\.4\d*"):
        fqjax.quantize(MLP(nnx.Rngs(0)), scheme, data)


@pytest.mark.parametrize("pattern", ["nowhere", "("])
def test_a_pattern_for_int8_that_fits_nothing_is_refused(pattern):
    with pytest.raises(InputError, match="int8_layers"):
        scheme = fqjax.PRESETS["w4a8"].override([f"int8_layers={pattern}"])
        fqjax.quantize(MLP(nnx.Rngs(0)), scheme, [jnp.ones((4, 24))])
