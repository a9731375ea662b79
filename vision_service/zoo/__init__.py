"""What the libraries offer, as specs: names, weights, classes and preprocessing taken from the library itself.

A family is a module with two functions:

    names() -> list[str]                            every model that it knows
    spec(name, version="") -> ModelSpec | None      one of them; ``None`` when it has no such name or version

A family whose library is not installed has no names. Files in a family's specs are names in the cache of weights.
"""

from __future__ import annotations

from importlib import import_module

from vision_service.config import ModelSpec

FAMILIES: dict[str, str] = {
    "torchvision": "vision_service.zoo.torchvision",
    "timm": "vision_service.zoo.timm",
    "darknet": "vision_service.zoo.darknet",
    "ultralytics": "vision_service.zoo.ultralytics",
}
"""Families in the order in which a name is looked for."""


def names() -> dict[str, list[str]]:
    """The names of every model, by family."""
    return {family: import_module(module).names() for family, module in FAMILIES.items()}


def find(name: str, version: str = "") -> ModelSpec | None:
    """The model of a name.

    Args:
        name: such as ``resnet50``.
        version: which weights of it; empty: the family's own choice.

    Returns:
        Its spec, or ``None`` when no family has it.
    """
    for module in FAMILIES.values():
        found: ModelSpec | None = import_module(module).spec(name, version)
        if found is not None:
            return found
    return None
