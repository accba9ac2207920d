"""Hugging Face checkpoints in the compressed-tensors format of vLLM and llm-compressor: read and written, without torch."""
