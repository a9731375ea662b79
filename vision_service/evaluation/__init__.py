"""Metrics and comparisons with reference implementations."""
