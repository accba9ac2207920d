"""Converts a Hugging Face checkpoint into a quantized Orbax directory: ``fqjax convert`` from a checkout.

Examples:
    python scripts/convert_hf_to_orbax.py path/to/llama out/llama-int --calibration train.txt
    python scripts/convert_hf_to_orbax.py org/name out/opt-int8 --scheme flattenquant-w8a8 --dry-run
"""

import sys

from fqjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
