"""Records the logits of transformers' torch models, which the tests compare fqjax's models with.

Example:
    pip install -e '.[dev,parity]' && python scripts/record_parity_logits.py

Needs torch.  The variants stand in tests/models/variants.py, the result in tests/models/data/parity.npz.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models import variants


def torch_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits (batch, length, vocabulary) of a checkpoint, by torch on the CPU."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def main() -> None:
    recorded = {}
    for name, config in variants.VARIANTS.items():
        with tempfile.TemporaryDirectory() as directory:
            recorded[name] = torch_logits(variants.write_checkpoint(Path(directory), config), variants.tokens())
        print(f"{name}: {np.abs(recorded[name]).max():.2f} at most")
    variants.RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(variants.RECORDED, **recorded)


if __name__ == "__main__":
    main()
