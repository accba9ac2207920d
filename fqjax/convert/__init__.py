"""Conversion of a checkpoint on disk, layer by layer."""
