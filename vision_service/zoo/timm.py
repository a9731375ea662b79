"""A family of models; see the package's docstring."""

from __future__ import annotations

from vision_service.config import ModelSpec


def names() -> list[str]:
    """None yet."""
    return []


def spec(name: str, version: str = "") -> ModelSpec | None:
    """None yet."""
    return None
