"""Quantization as passes over the blocks of a model."""
