"""Programs of other environments, not tests: looking for doctests would import them."""

collect_ignore_glob = ["*.py"]
