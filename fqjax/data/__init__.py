"""Text to calibrate and to evaluate on."""
