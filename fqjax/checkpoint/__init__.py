"""Checkpoints: Hugging Face directories in, Orbax directories out and in."""
