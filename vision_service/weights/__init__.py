"""Which models are known, where their parameters lie, and how to load them safely."""
