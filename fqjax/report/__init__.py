"""Reports on quantized models: tables, records of calibration, plots."""
