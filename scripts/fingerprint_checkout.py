"""Quantizes a checkpoint with one checkout and writes fingerprints that do not depend on how the checkout is structured.

``scripts/compare_checkouts.py`` runs it, one process for each checkout, checkpoint and scheme:

    PYTHONPATH=CHECKOUT python -P scripts/fingerprint_checkout.py TASK.json

It writes fingerprint.json (a SHA-256 of every array by layer, perplexity, seconds) and arrays.npz (the arrays).
:func:`canonical` and :data:`PLACES` alone know a layer's attributes.
"""

import dataclasses
import hashlib
import importlib
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BATCH = 2
"""Windows in a calibration batch."""
ROWS = 4
"""Rows of the random input whose output is recorded for every layer."""
LOGIT_TOKENS = 32
"""Tokens whose logits are recorded."""
OUTPUT_TOLERANCE = 0.02
"""Deviation from the output that a layer's numbers give, over the largest output: bfloat16 rounds off 0.004."""

PLACES: dict[str, tuple[str, ...]] = {
    "codes": ("weight.unpacked",),
    "dequantized": ("weight.dequantize",),
    "scale": ("weight.scale",),
    "group_scale": ("weight.group_scale",),
    "bias": ("bias",),
    "multiplier": ("input.multiplier",),
    "source": ("input.source",),
    "part": ("input.part",),
    "input_scale": ("input.scale",),
    "activation_bits": ("input.code_bits", "input.bits"),
}
"""Attribute paths of a layer's numbers, the first that exists is taken.  The paths of another layout are added here."""
UNSTACKED_MODULES = ("fqjax.stacking", "fqjax.layers.stacked")
"""Modules that may hold ``unstacked``, the function that lists the layers of stacked experts one by one."""
MODEL = "(model)"
"""Name under which the arrays of the whole model are recorded."""
NOT_KEPT = ("dequantized",)
"""Arrays of which only the fingerprint is written, as they follow from others."""

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement: a scheme on a checkpoint.

    Attributes:
      root: the checkout.
      model: directory of the checkpoint.
      scheme: a preset, followed by ``+KEY=VALUE`` for every setting that is changed.
      text: file to calibrate and evaluate on: calibration windows come from the first three quarters of its tokens.
      samples, window: number of calibration windows and their tokens, BOS among them.
      windows: number of windows of the perplexity.
      out: directory for the result.
    """

    root: str
    model: str
    scheme: str
    text: str
    samples: int
    window: int
    windows: int
    out: str


def canonical(layer: object) -> Arrays:
    """The numbers with which a quantized linear layer computes, whatever its attributes are called.

    Args:
      layer: with all of its arrays; an expert's layer by itself, not stacked.

    Returns:
      ``codes`` int8 (out, K'), ``dequantized`` float32 (out, K'), ``scale`` float32 (out,), ``multiplier`` float32 (K,),
      ``source`` and ``part`` int32 (E,), ``activation_bits`` (16 for floating point), and, if the layer has any,
      ``group_scale`` (groups, out), ``bias`` float32 (out,) and ``input_scale`` float32 (), without which every row has one.

    Raises:
      LookupError: naming what no known place holds.
      ValueError: if the codes and scales found do not multiply to the dequantized weight.
    """
    codes = np.asarray(_required(layer, "codes"), np.int8)
    arrays = {
        "codes": codes,
        "dequantized": np.asarray(_required(layer, "dequantized"), np.float32),
        "scale": np.broadcast_to(np.asarray(_required(layer, "scale"), np.float32), codes.shape[:1]),
        "multiplier": np.asarray(_required(layer, "multiplier"), np.float32),
        "source": np.asarray(_required(layer, "source"), np.int32),
        "part": np.asarray(_required(layer, "part"), np.int32),
        "activation_bits": np.asarray(_required(layer, "activation_bits"), np.int32),
    }
    for name in ("bias", "input_scale"):
        if (value := _first(layer, name)) is not None:
            arrays[name] = np.asarray(value, np.float32)
    if (groups := _first(layer, "group_scale")) is not None:
        kind = np.int32 if jnp.issubdtype(groups.dtype, jnp.integer) else np.float32
        arrays["group_scale"] = np.asarray(groups, kind)
    _check_weight(arrays)
    return arrays


def canonical_head(head: object) -> Arrays:
    """Codes (vocabulary, K') and scales (vocabulary,) of an output head in INT8."""
    codes, scale = (_unwrapped(getattr(head, name)) for name in ("codes", "scale"))
    return {"codes": np.asarray(codes, np.int8), "scale": np.asarray(scale, np.float32)}


def _required(layer: object, name: str) -> object:
    value = _first(layer, name)
    if value is None:
        places = ", ".join(PLACES[name])
        raise LookupError(f"{type(layer).__name__} has no {name} at {places}: add its place to PLACES")
    return value


def _first(layer: object, name: str) -> Any:
    """The value at the first place that exists, called if it is a method; None if there is none."""
    for path in PLACES[name]:
        value = layer
        for attribute in path.split("."):
            value = _unwrapped(getattr(value, attribute, None))
        if value is not None:
            return value() if callable(value) else value
    return None


def _unwrapped(value: object) -> Any:
    return value.get_value() if isinstance(value, nnx.Variable) else value


def _check_weight(arrays: Mapping[str, np.ndarray]) -> None:
    weight = arrays["codes"].astype(np.float64) * arrays["scale"][:, None]
    if "group_scale" in arrays:
        groups = arrays["group_scale"].T.astype(np.float64)
        weight *= np.repeat(groups, weight.shape[1] // groups.shape[1], axis=1)
    if not np.allclose(weight, arrays["dequantized"], rtol=1e-5, atol=0):
        raise ValueError("the scales found do not multiply the codes to the dequantized weight: see PLACES")


def described_output(arrays: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Output of a layer for float32 rows (rows, K), computed in NumPy from its canonical numbers alone."""
    smooth = x * arrays["multiplier"]
    source, part = arrays["source"], arrays["part"]
    if arrays["activation_bits"] == 16:
        inputs, scale = np.pad(smooth, ((0, 0), (0, len(source)))), np.float32(1)
    else:
        qmax = 2 ** (int(arrays["activation_bits"]) - 1) - 1
        scale = arrays.get("input_scale")
        if scale is None:
            scale = np.abs(smooth).max(axis=1, keepdims=True) / np.float32(qmax)
            smooth = smooth / scale
        codes = np.round(smooth).astype(np.int64)
        inputs = np.concatenate([_piece(codes, 0, qmax), _piece(codes[:, source], part, qmax)], axis=1)
    return inputs @ arrays["dequantized"].T.astype(np.float64) * scale + arrays.get("bias", 0)


def _piece(codes: np.ndarray, part: np.ndarray | int, qmax: int) -> np.ndarray:
    return np.sign(codes) * np.clip(np.abs(codes) - part * qmax, 0, qmax)


def random_rows(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Float32 rows (:data:`ROWS`, K) that reach all codes of a layer, those of flattened channels too."""
    bits = int(arrays["activation_bits"])
    largest = 2.0 ** (bits - 1) - 1 if "input_scale" in arrays else 1.0
    normal = np.random.default_rng(0).standard_normal((ROWS, len(arrays["multiplier"])))
    return (0.6 * largest * normal / arrays["multiplier"]).astype(np.float32)


def layer_arrays(name: str, layer: object) -> Arrays:
    """Canonical numbers of a layer and its output on random rows.

    Raises:
      ValueError: if the layer computes something else than its numbers say.
    """
    try:
        arrays = canonical(layer)
    except (LookupError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    x = random_rows(arrays)
    output, described = run(layer, x), described_output(arrays, x)
    deviation = np.abs(output - described).max() / max(np.abs(described).max(), 1e-30)
    if not deviation <= OUTPUT_TOLERANCE:
        raise ValueError(f"{name}: its output deviates by {deviation:.2%} from its numbers: see PLACES")
    return arrays | {"output": output}


def run(module: object, x: np.ndarray, method: str = "__call__") -> np.ndarray:
    """Output of a module in a jitted call, in float32."""
    graphdef, state = nnx.split(module)
    call = jax.jit(lambda state, x: getattr(nnx.merge(graphdef, state), method)(x))
    return np.asarray(call(state, x), np.float32)


def quantized_layers(model: nnx.Module) -> dict[str, nnx.Module]:
    """The model's quantized layers by dotted path, those of stacked experts one by one."""
    nodes = nnx.iter_graph(_unstacked(model))
    found = {_dotted(path): node for path, node in nodes if type(node).__name__ == "QuantizedLinear"}
    return dict(sorted(found.items()))


def int8_heads(model: nnx.Module) -> dict[str, nnx.Module]:
    """The output heads in INT8, by dotted path."""
    nodes = nnx.iter_graph(model)
    return {_dotted(path): node for path, node in nodes if all(hasattr(node, a) for a in ("codes", "scale", "logits"))}


def _unstacked(model: nnx.Module) -> nnx.Module:
    for name in UNSTACKED_MODULES:
        try:
            return importlib.import_module(name).unstacked(model)
        except ModuleNotFoundError:
            continue
    raise LookupError(f"none of {', '.join(UNSTACKED_MODULES)} exists: add the module of `unstacked`")


def _dotted(path: Iterable[object]) -> str:
    return ".".join(str(part) for part in path)


def all_arrays(model: Any, report: Any, scheme: str) -> dict[str, Arrays]:
    """Arrays of every quantized layer and of the head, by name.

    Raises:
      LookupError: if the layers found are not those of the report, or a head is missing.
    """
    layers, heads = quantized_layers(model), int8_heads(model)
    expected = {row.name for row in report.layers if row.bits < 16}
    if set(layers) != expected:
        different = sorted(set(layers) ^ expected)
        raise LookupError(
            f"{len(layers)} layers found, {len(expected)} reported; different: {', '.join(different[:4])}"
        )
    if ("int8_head=true" in scheme) != bool(heads):
        raise LookupError(f"{scheme}: {len(heads)} output heads in INT8 found")
    found = {name: layer_arrays(name, layer) for name, layer in layers.items()}
    for name, head in heads.items():
        features: int = head.features  # pyright: ignore[reportAttributeAccessIssue]
        hidden = np.random.default_rng(0).standard_normal((ROWS, features)).astype(np.float32)
        found[name] = canonical_head(head) | {"output": run(head, hidden, "logits")}
    return found


def model_arrays(model: Any, tokens: np.ndarray, perplexity: float) -> Arrays:
    """Logits, perplexity, and the fingerprints of all parameters in floating point, whatever their names are."""
    parameters = sorted(digest(np.asarray(leaf)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    logits = run(model, tokens[:1, :LOGIT_TOKENS])
    return {"tokens": tokens, "parameters": np.array(parameters), "logits": logits, "perplexity": np.array(perplexity)}


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and bytes."""
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def cut(ids: np.ndarray, bos: int, window: int, count: int) -> np.ndarray:
    """Windows of BOS and ``window - 1`` tokens, int32 (count, window), evenly spread over the tokens."""
    windows = len(ids) // (window - 1)
    if windows < count:
        raise ValueError(f"the text fills {windows} windows of {window} tokens, expected at least {count}")
    chosen = np.linspace(0, windows - 1, count).round().astype(int)
    body = ids[: windows * (window - 1)].reshape(windows, window - 1)[chosen]
    return np.concatenate([np.full((count, 1), bos), body], axis=1).astype(np.int32)


def measure(task: Task) -> None:
    """Quantizes, and writes fingerprint.json and arrays.npz into ``task.out``."""
    import fqjax

    if Path(task.root).resolve() not in Path(fqjax.__file__).resolve().parents:
        raise ValueError(f"{fqjax.__file__} was imported, which is not in {task.root}")
    start = time.perf_counter()
    model, tokenizer = fqjax.load_hf(task.model)
    assert tokenizer is not None  # The models that are compared all have one.
    text = Path(task.text).read_text(encoding="utf-8")
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    held_out = len(ids) * 3 // 4
    tokens = cut(ids[:held_out], model.config.bos_token_id, task.window, task.samples)
    preset, *settings = task.scheme.split("+")
    if preset not in fqjax.PRESETS:
        raise LookupError(f"there is no preset {preset}")
    scheme = fqjax.PRESETS[preset].override(settings) if settings else preset
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    model, report = fqjax.quantize(model, scheme, calibration=batches)
    seconds = time.perf_counter() - start
    perplexity = fqjax.perplexity(model, ids[held_out:], task.window, windows=task.windows)
    arrays = all_arrays(model, report, task.scheme) | {MODEL: model_arrays(model, tokens, perplexity)}
    write(Path(task.out), arrays, {"perplexity": perplexity, "seconds": seconds})


def write(out: Path, arrays: Mapping[str, Arrays], figures: Mapping[str, float]) -> None:
    """Writes the fingerprints of arrays by layer, and the arrays."""
    prints = {name: {key: digest(value) for key, value in own.items()} for name, own in arrays.items()}
    kept = {f"{name}/{key}": a for name, own in arrays.items() for key, a in own.items() if key not in NOT_KEPT}
    np.savez_compressed(out / "arrays.npz", **kept)  # pyright: ignore[reportArgumentType]
    (out / "fingerprint.json").write_text(json.dumps({"layers": prints, **figures}))


if __name__ == "__main__":
    measure(Task(**json.loads(Path(sys.argv[1]).read_text())))
