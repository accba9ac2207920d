"""Trains the checkpoint that is bundled with fqjax: a Llama of 2.9 M parameters with a tokenizer of its own.

Examples:
    python scripts/train_demo_model.py --out fqjax/demo/checkpoint          # the bundled one: half an hour on 2 cores
    python scripts/train_demo_model.py --out /tmp/demo --steps 50           # a quick look

The text is the documentation of Python 3.12 that comes with the package (fqjax/data/python_docs.py).
The weights kept are those with the lowest loss on the held-out part.

Large language models have a few activation channels that are tens of times larger than the rest, and those are what
quantization has to survive; a model this small has none.  So the trained weights are rewritten, by powers of two, into the
same function with such channels (``add_outliers``): it computes the same logits, and quantizes like a large model.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fqjax.data.python_docs import held_out_text, training_text
from fqjax.data.text import cut_windows
from fqjax.models.llama import Llama, LlamaConfig

BOS, EOS = 1, 2
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WINDOW = 256
CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=224,
    intermediate_size=672,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=56,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=(EOS,),
)


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def train(tokens: np.ndarray, held_out: np.ndarray, steps: int, batch: int, seed: int) -> Llama:
    """Returns the parameters with the lowest held-out loss."""
    graphdef, params = nnx.split(Llama(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 5 + 1), steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1))
    moments = optimizer.init(params)

    def loss(params: nnx.State, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @jax.jit
    def step(
        params: nnx.State, moments: optax.OptState, windows: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(loss)(params, windows)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value  # pyright: ignore[reportReturnType]

    evaluate = jax.jit(loss)
    rng = np.random.default_rng(seed)
    best, best_params, start = np.inf, params, time.time()
    for i in range(1, steps + 1):
        first = rng.integers(0, len(tokens) - WINDOW + 1, batch)
        windows = np.stack([np.concatenate([[BOS], tokens[f : f + WINDOW - 1]]) for f in first]).astype(np.int32)
        params, moments, value = step(params, moments, windows)
        if i % 100 == 0 or i == steps:
            held = float(evaluate(params, held_out))
            if held < best:
                best, best_params = held, params
            left = (time.time() - start) / i * (steps - i)
            print(f"step {i}: loss {float(value):.3f}, held out {held:.3f}, {left / 60:.0f} min left", flush=True)
    return nnx.merge(graphdef, best_params)


def add_outliers(model: Llama, share: float, seed: int) -> None:
    """Rewrites the model into the same function with large activation channels, in place.

    A few channels of every norm, and of every up projection, are multiplied by a power of two from 8 to 64, and the
    weights that read them divided by it.
    """
    rng = np.random.default_rng(seed)

    def factors(channels: int) -> np.ndarray:
        f = np.ones(channels, np.float32)
        f[rng.choice(channels, max(1, round(share * channels)), replace=False)] = 2.0 ** rng.integers(3, 7)
        return f

    for layer in model.layers:
        for norm, reader in (
            (layer.input_layernorm, layer.self_attn.qkv_proj),
            (layer.post_attention_layernorm, layer.mlp.gate_up_proj),
        ):
            f = factors(CONFIG.hidden_size)
            scale = _scale(norm)
            scale[...] = scale[...] * f
            reader.kernel[...] = reader.kernel[...] / f[:, None]
        f = factors(CONFIG.intermediate_size)
        gate_up = np.concatenate([np.ones_like(f), f])
        layer.mlp.gate_up_proj.kernel[...] = layer.mlp.gate_up_proj.kernel[...] * gate_up
        layer.mlp.down_proj.kernel[...] = layer.mlp.down_proj.kernel[...] / f[:, None]


def _scale(norm: nnx.RMSNorm) -> nnx.Param:
    assert norm.scale is not None
    return norm.scale


def hugging_face_tensors(model: Llama) -> dict[str, np.ndarray]:
    """The parameters in bfloat16, named and laid out as in a Hugging Face checkpoint."""
    c, out = CONFIG, {}

    def put(name: str, array: jax.Array | np.ndarray) -> None:
        out[name] = np.ascontiguousarray(np.asarray(array).astype(jnp.bfloat16))

    put("model.embed_tokens.weight", model.embed_tokens.embedding[...])
    put("model.norm.weight", _scale(model.norm)[...])
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}."
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        q, k, v = np.split(np.asarray(layer.self_attn.qkv_proj.kernel[...]).T, [heads, heads + kv])
        gate, up = np.split(np.asarray(layer.mlp.gate_up_proj.kernel[...]).T, 2)
        for name, array in {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.self_attn.o_proj.kernel[...].T,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down_proj.kernel[...].T,
            "input_layernorm": _scale(layer.input_layernorm)[...],
            "post_attention_layernorm": _scale(layer.post_attention_layernorm)[...],
        }.items():
            put(f"{prefix}{name}.weight", array)
    return out


def write_checkpoint(out: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Writes a Hugging Face directory."""
    out.mkdir(parents=True, exist_ok=True)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"}
    config |= {key: getattr(CONFIG, key) for key in same}
    config |= {"rope_theta": CONFIG.rope_theta, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 3}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    words |= {"unk_token": "<unk>", "pad_token": "<pad>", "clean_up_tokenization_spaces": False}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n")
    (out / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), separators=(",", ":")))
    save_file(hugging_face_tensors(model), out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--outliers", type=float, default=0.02, help="share of channels made large; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    text = training_text()
    tokenizer = train_tokenizer(text)
    tokens = np.array(tokenizer.encode(text).ids)
    held_out = cut_windows(np.array(tokenizer.encode(held_out_text()).ids), WINDOW, BOS, 64)
    print(f"{len(tokens)} tokens to train on, {held_out.size} held out")
    model = train(tokens, held_out, a.steps, a.batch, a.seed)
    if a.outliers:
        add_outliers(model, a.outliers, a.seed)
    write_checkpoint(a.out, model, tokenizer)
    print(f"wrote {a.out}: {sum(f.stat().st_size for f in a.out.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
