"""A query and its documents, for the gateway's tests."""

QUERY = "why do tides rise and fall?"
# The second is right for the query, whatever order the others get.
DOCUMENTS = [
    "Bread rises because yeast makes gas.",
    "Tides rise and fall because the moon's gravity pulls the sea.",
    "The stock market fell on Monday.",
]
