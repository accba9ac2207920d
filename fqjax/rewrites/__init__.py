"""Changes to a whole model that leave its function as it was."""
