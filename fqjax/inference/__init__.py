"""Jitted inference loops."""
