"""Ways to round a weight to a grid."""
