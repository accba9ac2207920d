"""Pure functions on arrays; no knowledge of models.  One idea a file."""
