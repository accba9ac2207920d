"""Pallas Mosaic GPU: versions, registers, lanes."""
