"""The whole stack on one machine: an embedded Redis, a worker and Flower, supervised."""
