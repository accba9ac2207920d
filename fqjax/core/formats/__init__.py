"""Formats of weights: grid, codes and stored arrays; one format a file."""
