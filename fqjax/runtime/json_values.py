"""The type of JSON objects that have been read, but not yet validated."""

from collections.abc import Mapping

JsonMapping = Mapping[str, object]
"""Entries by name; each is None, a bool, a number, a string, a list or another object."""
