"""Forms that results take beside ``results.jsonl``."""
