"""The whole stack on one machine: a Redis of one's own, a worker, Flower, watched over."""
