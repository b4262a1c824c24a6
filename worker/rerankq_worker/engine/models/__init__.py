"""A checkpoint on a device: how it is found, loaded, held against itself, and run."""
