"""Batcher, host, catalog and pipeline."""
