"""Is everything reachable and consistent? ``collect`` asks, ``checks`` judge."""
