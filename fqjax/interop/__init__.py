"""Exchange of quantized weights with other libraries."""
