"""The bundled checkpoint, and the demonstration on it."""
