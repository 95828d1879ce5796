"""Image data, and the training of one network."""
