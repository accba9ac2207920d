"""The bundled checkpoint, the text it was trained on, and the demonstration that uses both."""
