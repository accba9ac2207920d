"""NNX modules of quantized models, and the surgery that puts them in place."""
