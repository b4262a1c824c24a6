"""The heavy side of rerankq: what a machine with a device runs."""
