"""From a query and chunks to the token ids of pairs."""
