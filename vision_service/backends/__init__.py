"""Adapters: one file per family of networks."""
