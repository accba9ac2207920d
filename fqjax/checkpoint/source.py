"""A model's directory of either kind, fqjax's own or Hugging Face's, as the commands take it."""

from typing import TYPE_CHECKING, Literal, overload

import jax.numpy as jnp

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.foreign import foreign_inside
from fqjax.checkpoint.hugging_face import read_model, resolve_directory
from fqjax.checkpoint.manifest import MANIFEST_FILE, read_config, read_manifest
from fqjax.checkpoint.orbax.read import load
from fqjax.checkpoint.text_tokens import with_text_tokens
from fqjax.checkpoint.tokenizer import check_vocabulary, load_tokenizer
from fqjax.models.causal_lm import CausalLM
from fqjax.runtime.errors import InputError
from fqjax.runtime.files import exists
from fqjax.runtime.notices import held, said_at_the_end, say_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Source:
    """Where a model comes from.  Opening it reads the configuration, and no weights.

    Args:
      path_or_id: an fqjax checkpoint, a Hugging Face directory, or a hub id.

    Raises:
      InputError: if it is none of them, or its configuration is not valid.
    """

    def __init__(self, path_or_id: str):
        self.name, self.directory = path_or_id, resolve_directory(path_or_id)
        self.own = exists(self.directory / MANIFEST_FILE)
        if self.own:
            self.config = read_config(read_manifest(self.directory), self.directory)
        elif exists(self.directory / "config.json"):
            with held() as self._notices:
                self.architecture, self.config = read_architecture(self.directory)
            self._settled = None
        else:
            found = foreign_inside(self.directory)
            raise InputError(
                f"{path_or_id}: not a model: neither {MANIFEST_FILE} (fqjax) nor config.json (Hugging Face) is in it"
                + (f"; {found}" if found else "")
            )

    @overload
    def tokenizer(self, *, required: Literal[True] = True) -> "PreTrainedTokenizerBase": ...
    @overload
    def tokenizer(self, *, required: bool) -> "PreTrainedTokenizerBase | None": ...
    def tokenizer(self, *, required: bool = True) -> "PreTrainedTokenizerBase | None":
        """The tokenizer; None if there is none and it is not required.

        Raises:
          InputError: if there is none but has to be one, it cannot be loaded, or it has tokens that the model does not.
        """
        tokenizer = load_tokenizer(self.directory)
        if tokenizer is None and required:
            raise InputError(f"{self.name}: has no tokenizer")
        check_vocabulary(tokenizer, self.config.vocab_size, self.directory)
        if not self.own:
            with held() as notices:
                self._settled = with_text_tokens(self.config, self.directory, tokenizer)
            self._notices += notices
        return tokenizer

    def model(self) -> CausalLM:
        """The model, in bfloat16 where it comes from Hugging Face; its tokens of begin and end are the tokenizer's, where
        that has been loaded.  What there is to know of its files is said when it is there.

        Raises:
          InputError: as :func:`fqjax.load` and :func:`fqjax.load_hf` do.
        """
        if self.own:
            return load(self.directory)
        with said_at_the_end():
            config = self._settled or with_text_tokens(self.config, self.directory, None)
            model = read_model(self.directory, self.architecture, config, jnp.bfloat16)
            for notice in self._notices:
                say_once(notice)
        return model
