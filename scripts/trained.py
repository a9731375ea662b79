"""Torchvision's networks that `train_fidelity.py` trains on small public data, so that there is something to compare.

The official weights have to be fetched; random ones answer to the rounding of a pixel. What is described here is one
network in two forms: the library's own, with its own resizing, and the spec that the service serves it by.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision import models

from vision_service.config import ModelSpec, WeightsSpec
from vision_service.engine.build import replace_fields
from vision_service.types import Task
from vision_service.zoo import torchvision as zoo

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "fidelity"
"""Where trained weights lie. They are made here and stay here: the photos have terms of their own."""

CELLS = ("__background__", "Platelets", "RBC", "WBC")
MEMBRANES = ("__background__", "membrane")


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        minutes: of processor time, on the machine that the figures come from.
        batch: images a step.
        rate: AdamW's, at its highest.
        side: shortest side of the input, pixels; 0: the network's own. Smaller ones make the large networks affordable.
    """

    minutes: float
    batch: int
    rate: float = 1e-3
    side: int = 0


RECIPES = {
    "ssdlite320_mobilenet_v3_large": Recipe(10, 8),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Recipe(8, 4, 5e-4),
    "lraspp_mobilenet_v3_large": Recipe(4, 4),
    "retinanet_resnet50_fpn": Recipe(7, 4, 3e-4, side=192),
    "fcos_resnet50_fpn": Recipe(7, 4, 3e-4, side=192),
    "maskrcnn_resnet50_fpn": Recipe(7, 4, 3e-4, side=192),
}


def weights_file(name: str) -> Path:
    """Where a trained network's weights are cached."""
    return CACHE / f"{name}.safetensors"


def classes_of(name: str) -> tuple[str, ...]:
    """Class names, the background first."""
    return MEMBRANES if _known(name).task is Task.SEGMENT else CELLS


def library(name: str, **more: Any) -> Any:
    """The network as torchvision builds it, with the recipe's input size.

    Args:
        name: in `RECIPES`.
        more: further arguments of the library's builder.
    """
    network: Any = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=len(classes_of(name)), **more
    )
    if RECIPES[name].side:
        network.transform.min_size = (RECIPES[name].side,)
    return network


def served(name: str) -> ModelSpec:
    """The same network as a spec with the cached weights: the zoo's, with other classes and the recipe's size."""
    known, file = _known(name), weights_file(name)
    side = RECIPES[name].side
    spec = known.model_copy(
        update={
            "classes": classes_of(name),
            # As the library was built: the epsilon of its COCO weights is not that of weights trained from scratch.
            "options": {key: value for key, value in known.options.items() if key != "zero_eps"},
            "weights": WeightsSpec(
                file=str(file),
                sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
                licence="of the training images",
                source="scripts/train_fidelity.py",
            ),
            "device": "cpu",
        }
    )
    return replace_fields(spec, {"preprocess": {"resize": {"shortest_side": side}}} if side else {})


def _known(name: str) -> ModelSpec:
    spec = zoo.spec(name)
    if spec is None:
        raise SystemExit(f"torchvision has no model {name!r}")
    return spec
