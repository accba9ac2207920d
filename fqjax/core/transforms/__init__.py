"""Changes of a layer's input and weight that leave their product as it was; one a file."""
