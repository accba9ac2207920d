"""Types of what goes through the blocks of a model."""

from typing import TypeAlias

Batch: TypeAlias = object
"""Input of a model: an array, a tuple of positional arguments, or a mapping of keyword arguments."""

Activations: TypeAlias = object
"""Output of a block for one batch, and input of the next one: an array, or any tree of arrays."""

Others: TypeAlias = object
"""Arguments that every block is called with besides its input, for one batch: any tree of arrays."""

Pair: TypeAlias = tuple[Activations, Activations]
"""Activations of the float model, and of the one quantized so far, for the same batch."""
