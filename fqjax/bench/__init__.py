"""Benchmarks: what the kernels and the models reach on this machine, beside what else there is."""
