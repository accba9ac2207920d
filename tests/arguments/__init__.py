"""Malformed arguments of public functions: one line that names the argument, before anything is computed or written."""
