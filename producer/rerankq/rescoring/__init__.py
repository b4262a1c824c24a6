"""Files in, files out: a first-stage run is scored again."""
