"""Models of one's own, in the forms that people give them: each works, or one line names the layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

import fqjax
from fqjax.layers.linear import QuantizedLinear
from fqjax.layers.stacked import quantized_layers
from fqjax.layers.surgery import replace_modules, select_linears
from fqjax.runtime.errors import InputError

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)


def linear(rngs):
    return nnx.Linear(8, 8, rngs=rngs)


class Two(NamedTuple):
    first: object
    others: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Container(nnx.Module):
    """Layers in containers of Python's own, some of which Flax does not change."""

    def __init__(self, rngs):
        self.shared = linear(rngs)
        self.tuple = nnx.data((self.shared, [linear(rngs)], self.shared))
        self.named = nnx.data(Two(linear(rngs), (linear(rngs), {"z": linear(rngs)})))
        self.pair = nnx.data({"a": Pair(linear(rngs), [linear(rngs)])})
        self.inside = nnx.List([nnx.data((linear(rngs),))])
        self.sizes = (3, 4)

    def __call__(self, x):
        layers = [*self.tuple[:1], *self.tuple[1], self.named.first, self.named.others[0], self.named.others[1]["z"]]
        for layer in [*layers, self.pair["a"].left, *self.pair["a"].right, *self.inside[0], self.tuple[2]]:
            x = jnp.tanh(layer(x))
        return x


NAMES = ["shared", "tuple.1.0", "named.first", "named.others.0", "named.others.1.z", "pair.a.left", "pair.a.right.0"]
NAMES += ["inside.0.0"]


def test_layers_in_tuples_lists_dictionaries_and_dataclasses(tmp_path):
    model = Container(nnx.Rngs(0))
    quantized, report = fqjax.quantize(model, "w8a8", [X])
    assert {row.name for row in report.layers} == set(NAMES) == set(quantized_layers(quantized))
    assert isinstance(quantized.tuple, tuple) and isinstance(quantized.named, Two) and quantized.sizes == (3, 4)
    assert isinstance(quantized.pair["a"], Pair) and isinstance(quantized.inside[0], tuple)
    assert quantized.tuple[0] is quantized.tuple[2] is quantized.shared
    assert isinstance(model.tuple[1][0], nnx.Linear) and isinstance(quantized.tuple[1][0], QuantizedLinear)
    np.testing.assert_allclose(quantized(X), model(X), atol=0.05)
    fqjax.save(tmp_path / "out", quantized)
    again = fqjax.load(tmp_path / "out", nnx.eval_shape(lambda: Container(nnx.Rngs(1))))
    np.testing.assert_array_equal(again(X), quantized(X))


class Named(nnx.Module):
    """Layers under names that a dotted path does not tell apart from other modules."""

    def __init__(self, rngs, first):
        self.a = nnx.Sequential(linear(rngs))
        setattr(self, first, linear(rngs))

    def __call__(self, x):
        return self.a(x)


@pytest.mark.parametrize("name", ["", "a.layers.0"])
def test_paths_that_are_those_of_others_are_refused(name):
    with pytest.raises(InputError, match=f"^layer '{name}': another module has this path too"):
        fqjax.quantize(Named(nnx.Rngs(0), name), "w8a8", [X])


def test_a_module_that_nothing_replaces_stays_in_its_container():
    model = Container(nnx.Rngs(0))
    same = replace_modules(model, {})
    assert same.tuple[0] is same.shared and nnx.graphdef(same) == nnx.graphdef(model)


class Calling(nnx.Module):
    """Calls its layer within some transformation of JAX's or of Flax's."""

    def __init__(self, rngs, how):
        self.block, self.how = linear(rngs), how

    def __call__(self, x):
        return self.how(self.block, x)


NESTED = {
    "fori_loop": lambda block, x: lax.fori_loop(0, 3, lambda i, y: block(y), x),
    "scan": lambda block, x: lax.scan(lambda y, _: (block(y), None), x, length=3)[0],
    "cond": lambda block, x: lax.cond(jnp.sum(x) > 0, lambda y: block(y), lambda y: y, x),
    "while_loop": lambda block, x: lax.while_loop(lambda y: jnp.sum(y) > 1e9, lambda y: block(y), x),
    "vmap": lambda block, x: jax.vmap(lambda row: block(row))(x),
    "jit": lambda block, x: jax.jit(lambda y: block(y))(x),
    "checkpoint": lambda block, x: jax.checkpoint(lambda y: block(y))(x),
}


@pytest.mark.parametrize("name", NESTED)
def test_a_layer_called_within_a_transformation_of_jax_is_named(name):
    model = Calling(nnx.Rngs(0), NESTED[name])
    with pytest.raises(
        InputError, match=r"^block: the model calls it inside of a transformation of JAX's.*nnx"
    ) as caught:
        fqjax.quantize(model, "w8a8", [X])
    assert "\n" not in str(caught.value)


def test_a_layer_called_within_a_transformation_of_flax_is_quantized():
    def looped(block, x):
        return nnx.fori_loop(0, 3, lambda i, carry: (carry[0], jnp.tanh(carry[0](carry[1]))), (block, x))[1]

    model = Calling(nnx.Rngs(0), looped)
    quantized, report = fqjax.quantize(model, "w8a8", [X])
    assert [(row.name, row.bits, row.macs) for row in report.layers] == [("block", 8, 64)]
    np.testing.assert_allclose(quantized(X), model(X), atol=0.05)


class Reading(nnx.Module):
    """Reads attributes of a layer."""

    def __init__(self, rngs, read):
        self.block, self.other, self.read = linear(rngs), linear(rngs), read

    def __call__(self, x):
        return self.other(jnp.tanh(self.block(x))) + self.read(self.block, x)


@pytest.mark.parametrize("name", ["kernel", "use_bias", "precision", "promote_dtype"])
def test_a_layer_of_which_the_model_reads_what_a_quantized_one_has_not_is_named(name):
    model = Reading(nnx.Rngs(0), lambda block, x: 0 * x + (getattr(block, name) is not None))
    with pytest.raises(InputError, match=f"^block: the model reads its '{name}'"):
        fqjax.quantize(model, "w8a8", [X])
    quantized, _ = fqjax.quantize(model, "w8a8", [X], ignore=["block"])
    assert isinstance(quantized.other, QuantizedLinear) and isinstance(quantized.block, nnx.Linear)


@pytest.mark.parametrize("scheme", ["w8a8", pytest.param("flattenquant", marks=pytest.mark.thorough)])
def test_what_a_quantized_layer_has_too_may_be_read(scheme):
    model = Reading(nnx.Rngs(0), lambda block, x: x * block.in_features / block.out_features + block.bias[...])
    quantized, _ = fqjax.quantize(model, scheme, [X])
    assert quantized.block.in_features == quantized.block.out_features == 8
    np.testing.assert_allclose(quantized(X), model(X), atol=0.02 if scheme == "w8a8" else 0.5)


class Scanned(nnx.Module):
    """Layers that are stacked, as nnx.vmap makes and nnx.scan takes them, and one that is not."""

    def __init__(self, rngs):
        make = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
        self.blocks, self.out = make(jax.random.split(jax.random.key(0), 3)), linear(rngs)

    def __call__(self, x):
        step = nnx.scan(lambda block, x: jnp.tanh(block(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.out(step(self.blocks, x))


def test_stacked_layers_may_be_ignored(tmp_path):
    model = Scanned(nnx.Rngs(0))
    with pytest.raises(InputError, match=r"^blocks: its weight has shape \(3, 8, 8\).*may be ignored"):
        fqjax.quantize(model, "w8a8", [X])
    quantized, report = fqjax.quantize(model, "w8a8", [X], ignore=["blocks"])
    assert [row.name for row in report.layers] == ["out"] and report.skipped == {"blocks": "ignored by 'blocks'"}
    np.testing.assert_allclose(quantized(X), model(X), atol=0.05)
    fqjax.save(tmp_path / "out", quantized)
    again = fqjax.load(tmp_path / "out", Scanned(nnx.Rngs(1)))
    np.testing.assert_array_equal(again(X), quantized(X))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_values_that_are_not_finite_are_named(name, value):
    model = nnx.Sequential(linear(nnx.Rngs(0)), linear(nnx.Rngs(1)))
    variable = getattr(model.layers[1], name)
    variable[...] = variable[...].at[0].set(value)
    what = "bias" if name == "bias" else "weight"
    with pytest.raises(InputError, match=rf"^layers\.1: its {what} holds a value that is not finite$"):
        fqjax.quantize(model, "w8a8", [X])


def doubled(*args, **kwargs):
    return 2 * lax.dot_general(*args, **kwargs)


def halved(arrays, *, dtype):
    return [array if array is None else (array / 2).astype(dtype or array.dtype) for array in arrays]


OF_THEIR_OWN = {
    "dot_general": ({"dot_general": doubled}, "computes its product with a dot_general of its own"),
    "promote_dtype": ({"promote_dtype": halved}, "has a promote_dtype of its own"),
    "complex weights": ({"param_dtype": jnp.complex64}, "computes in complex64"),
    "a complex dtype": ({"dtype": jnp.complex64}, "computes in complex64"),
    "a complex output": ({"preferred_element_type": jnp.complex64}, "computes in complex64"),
    "no outputs": ({"out_features": 0, "kernel_init": nnx.initializers.zeros}, "has no channels: 8 inputs, 0 outputs"),
}


@pytest.mark.parametrize("case", OF_THEIR_OWN)
def test_layers_that_are_no_product_of_real_numbers_stay_in_float(case):
    options, why = OF_THEIR_OWN[case]
    made = nnx.Linear(**{"in_features": 8, "out_features": 8, "rngs": nnx.Rngs(1)} | options)
    if "output" in case:
        ignored = select_linears(nnx.Sequential(linear(nnx.Rngs(0)), made)).skipped
        assert ignored == {"layers.1": why}
        return
    model = nnx.Sequential(linear(nnx.Rngs(0)), made)
    quantized, report = fqjax.quantize(model, "w8a8", [X])
    assert [row.name for row in report.layers] == ["layers.0"] and report.skipped == {"layers.1": why}
    np.testing.assert_allclose(quantized(X), model(X), atol=0.1)
    with pytest.raises(InputError, match=f"to quantize .of 1 found; layers.0: {why}"):
        fqjax.quantize(nnx.Sequential(made), "w8a8", [X])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "kept"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_the_type_of_a_product_is_kept(bias, dtype, kept, tmp_path):
    def make():
        options = {"dtype": dtype, "preferred_element_type": kept, "use_bias": bias, "rngs": nnx.Rngs(0)}
        return nnx.Sequential(nnx.Linear(8, 8, **options))

    model = make()
    quantized, _ = fqjax.quantize(model, "w8a8", [X])
    assert quantized(X).dtype == model(X).dtype
    fqjax.save(tmp_path / "out", quantized)
    assert fqjax.load(tmp_path / "out", make())(X).dtype == model(X).dtype


def test_ignored_layers_are_not_checked():
    model = nnx.Sequential(linear(nnx.Rngs(0)), linear(nnx.Rngs(1)))
    model.layers[0].kernel[...] = model.layers[0].kernel[...] * 1e30
    model.layers[0].kernel[...] = model.layers[0].kernel[...].at[0, 0].set(jnp.nan)
    assert list(select_linears(model, ["layers.0"]).linears) == ["layers.1"]
    with pytest.raises(InputError, match=r"^layers\.0: its weight holds"):
        fqjax.quantize(model, "w8a8", [X])
    with pytest.raises(
        InputError, match=r"^layers\.1: calibration met a non-finite"
    ):  # It is the other's input that is bad.
        fqjax.quantize(model, "w8a8", [X], ignore=["layers.0"])


class Dropping(nnx.Module):
    """Layers with random state: one stream for two dropouts, one of its own for a third."""

    def __init__(self, rngs):
        self.block, self.drop = linear(rngs), nnx.Dropout(0.5, rngs=rngs)
        self.same, self.own = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=nnx.Rngs(7))

    def __call__(self, x):
        return self.own(self.same(self.drop(self.block(x))))


def test_a_model_with_dropout_is_loaded_from_its_shapes(tmp_path):
    quantized, _ = fqjax.quantize(Dropping(nnx.Rngs(0)), "w8a8", [X])
    fqjax.save(tmp_path / "out", quantized)
    loaded = fqjax.load(tmp_path / "out", nnx.eval_shape(lambda: Dropping(nnx.Rngs(0))))
    assert not [leaf for leaf in jax.tree.leaves(nnx.state(loaded)) if isinstance(leaf, jax.ShapeDtypeStruct)]
    run = nnx.jit(lambda model, x: model(x))
    dropped = [np.asarray(run(loaded, X)) == 0 for _ in range(2)]
    assert 0.5 < dropped[0].mean() < 1 and (dropped[0] != dropped[1]).any()
    views = [nnx.view(model, deterministic=True) for model in (loaded, quantized)]
    np.testing.assert_array_equal(run(views[0], X), run(views[1], X))


def test_a_model_that_is_a_layer_itself_is_spoken_of(tmp_path):
    model = linear(nnx.Rngs(0))
    quantized, _ = fqjax.quantize(model, "w8a8", [X])
    np.testing.assert_allclose(quantized(X), model(X), atol=0.05)
    for data, message in (([X * np.nan], "calibration met"), ([X * 1e20], "its inputs reach"), ([X[:, :3]], "")):
        with pytest.raises(InputError, match=f"(^|: )the model(: {message}| cannot)"):
            fqjax.quantize(model, "w8a8", data)
    model.kernel[...] = model.kernel[...] * jnp.inf
    with pytest.raises(InputError, match="^the model: its weight"):
        fqjax.quantize(model, "w8a8", [X])


def test_a_model_that_is_quantized_already():
    quantized, _ = fqjax.quantize(nnx.Sequential(linear(nnx.Rngs(0))), "w8a8", [X])
    with pytest.raises(InputError, match="Sequential is quantized already"):
        fqjax.quantize(quantized, "w8a8", [X])


def test_complex_numbers_are_refused_where_codes_would_hold_one_part():
    quantized, _ = fqjax.quantize(nnx.Sequential(linear(nnx.Rngs(0))), "w8a8", [X])
    with pytest.raises(InputError, match="complex64; expected real"):
        quantized(X.astype(np.complex64))

    class Rotating(nnx.Module):
        def __init__(self, rngs):
            self.block = linear(rngs)

        def __call__(self, x):
            return self.block(x * 1j)

    with pytest.raises(InputError, match="^block: calibration met complex64 activations"):
        fqjax.quantize(Rotating(nnx.Rngs(0)), "w8a8", [X])


@pytest.mark.parametrize("factor", [1e30, 1e16, 1e-20, 1e-30])
@pytest.mark.parametrize("scheme", ["w8a8", "flattenquant"])
def test_magnitudes_whose_squares_float32_does_not_hold_are_named(scheme, factor):
    model = nnx.Sequential(linear(nnx.Rngs(0)), linear(nnx.Rngs(1)))
    model.layers[1].kernel[...] = model.layers[1].kernel[...] * factor
    with pytest.raises(InputError, match=r"^layers\.1: its weights reach .* expected from 1e-15 to 1e\+15"):
        fqjax.quantize(model, scheme, [X])


def test_a_model_of_zeros_is_quantized():
    model = nnx.Sequential(linear(nnx.Rngs(0)), linear(nnx.Rngs(1)))
    for layer in model.layers:
        layer.kernel[...] = layer.kernel[...] * 0
    quantized, report = fqjax.quantize(model, "flattenquant", [X])
    assert [row.relative_error for row in report.layers] == [0, 0]
    np.testing.assert_array_equal(quantized(X), model(X))


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(8)(x)


def bridged():
    return nnx.bridge.lazy_init(nnx.bridge.ToNNX(Dense(), rngs=nnx.Rngs(0)), X)


@pytest.mark.parametrize("form", [Dense, lambda: (Dense(), {"params": {}}), bridged])
def test_models_of_flax_linen_are_refused_in_one_line(form):
    with pytest.raises(
        InputError, match="model: .* linen module.*; Flax linen is not supported; expected an nnx.Module"
    ):
        fqjax.quantize(form(), "w8a8", [X])


@pytest.mark.parametrize(
    "call", [fqjax.generate, fqjax.stream, fqjax.serve, fqjax.perplexity], ids=lambda f: f.__name__
)
def test_generation_of_flax_linen_says_what_to_do(call):
    for form in (Dense(), Dense().bind({"params": {}})):
        with pytest.raises(
            InputError, match="^model: Dense is a linen module; Flax linen is not supported; expected an nnx"
        ):
            call(form, [1])


def test_layers_that_quantization_makes_larger_are_told_of(caplog):
    small = nnx.Sequential(nnx.Linear(8, 13, rngs=nnx.Rngs(0)), nnx.Linear(13, 128, rngs=nnx.Rngs(1)))
    report = fqjax.quantize(small, "w4a16")[1]
    (line,) = (record.getMessage() for record in caplog.records if record.name.startswith("fqjax"))
    first, _ = report.layers
    assert line.startswith("2 of 2 quantized layers take more bytes than in bf16")
    assert f"layers.0 takes {first.bytes} instead of {2 * (8 * 13 + 13)}; ignore" in line
    caplog.clear()
    fqjax.quantize(nnx.Linear(256, 256, rngs=nnx.Rngs(0)), "w4a16")
    assert not caplog.records


class Embedded(nnx.Module):
    """A layer between an embedding and a norm, which stay as they are."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Embed(20, 256, rngs=rngs), nnx.LayerNorm(256, rngs=rngs)
        self.linear = nnx.Linear(256, 256, rngs=rngs)

    def __call__(self, tokens):
        return self.norm(self.linear(self.embed(tokens)))


def test_gradients_pass_layers_with_activations_in_floating_point():
    model, tokens = Embedded(), jnp.arange(20)
    seen = jax.random.normal(jax.random.key(0), (20, 256))
    quantized, _ = fqjax.quantize(model, "w4a16")
    weight = quantized.linear.weight.get_value().dequantize()
    model.linear.kernel[...] = weight.T  # The same function, in floating point.

    def gradients(model):
        return nnx.jit(nnx.grad(lambda model: jnp.vdot(model(tokens), seen)))(model)

    found, wanted = gradients(quantized), gradients(model)
    for name in ("embed", "norm"):
        assert len(jax.tree.leaves(found[name])) == len(jax.tree.leaves(wanted[name])) > 0
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found[name], wanted[name])


def test_gradients_do_not_pass_integer_activations():
    quantized, _ = fqjax.quantize(Embedded(), "w4a8")
    with pytest.raises(NotImplementedError, match="cannot be differentiated: it works on integer codes"):
        nnx.grad(lambda model: model(jnp.arange(20)).sum())(quantized)
