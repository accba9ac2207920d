"""Integer matmuls."""
