"""Re-scoring of a first-stage run, from files to a file, over an open client."""
