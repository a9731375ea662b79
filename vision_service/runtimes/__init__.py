"""Ways to execute a network."""
