"""Integer matmuls for NVIDIA Hopper, in Pallas Mosaic GPU."""
