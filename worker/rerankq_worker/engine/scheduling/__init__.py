"""Which pairs go to the device next, and what becomes of them."""
