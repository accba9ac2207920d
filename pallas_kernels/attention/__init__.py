"""Attention of one new token a sequence over a key-value cache."""
