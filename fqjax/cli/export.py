"""``fqjax export``: a quantized model in other tools' formats."""

from pathlib import Path
from typing import Annotated

import typer

from fqjax.cli.app import Model, app, console, load_with_tokenizer
from fqjax.runtime.files import check_new


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Hugging Face directory to create.")],
) -> None:
    """Write a quantized model in the format compressed-tensors, as vLLM and transformers read it."""
    from fqjax.checkpoint.compressed.write import save_compressed_tensors

    check_new(out)
    loaded, tokenizer = load_with_tokenizer(model, required=False)
    save_compressed_tensors(out, loaded, tokenizer=tokenizer)
    console.print(f"wrote {out}")
