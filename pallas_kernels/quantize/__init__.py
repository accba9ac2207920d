"""Activations to integer codes."""
