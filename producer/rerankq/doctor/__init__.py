"""Is everything reachable and consistent? ``collect`` takes a snapshot, ``checks`` judge it, ``render`` writes it."""
