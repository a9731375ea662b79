"""Architectures of the package ultralytics: YAML that lists modules by name, checked before anything is built from it.

The library looks names up among everything it has imported and evaluates the field ``activation`` as Python, so a
description that comes with weights is as hostile as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vision_service.errors import ConfigError, choices

DETECTORS = frozenset({"Detect", "v10Detect", "Segment", "Segment26", "RTDETRDecoder"})
CLASSIFIERS = frozenset({"Classify"})

# fmt: off
_BLOCKS = frozenset({
    "A2C2f", "AConv", "ADown", "AIFI", "Bottleneck", "BottleneckCSP", "C1", "C2", "C2PSA", "C2f", "C2fCIB",
    "C2fPSA", "C3", "C3Ghost", "C3TR", "C3k2", "C3x", "CBFuse", "CBLinear", "Concat", "Conv", "Conv2",
    "ConvTranspose", "DWConv", "DWConvTranspose2d", "ELAN1", "Focus", "GhostBottleneck", "GhostConv", "HGBlock",
    "HGStem", "PSA", "RepC3", "RepConv", "RepNCSPELAN4", "ResNetLayer", "SCDown", "SPP", "SPPELAN", "SPPF",
    "Silence",
})
# fmt: on
_TORCH_MODULE = re.compile(r"nn\.(Upsample|Identity|Conv2d|BatchNorm2d|MaxPool2d|ZeroPad2d|SiLU|ReLU|ConvTranspose2d)")
_ACTIVATION = re.compile(
    r"(torch\.)?nn\.(SiLU|ReLU|ReLU6|LeakyReLU|GELU|Mish|Hardswish|Identity|ELU)\((inplace=(True|False)|[0-9.]*)\)"
)


def packaged(root: Path, name: str) -> tuple[Path, str]:
    """The file of an architecture that comes with the library.

    Args:
        root: the folder of the package ultralytics.
        name: such as ``yolov8n-seg``; one file describes all sizes, the letter behind the version chooses.

    Returns:
        The file, and the size's letter; empty when the file describes one size.

    Raises:
        ConfigError: there is none; names near matches.
    """
    files = {file.stem: file for file in sorted((root / "cfg" / "models").rglob("*.yaml"))}
    size = re.fullmatch(r"(yolov?\d+)([nslmx])(-.+)?", name)
    if name in files:
        return files[name], ""
    if size and (general := f"{size[1]}{size[3] or ''}") in files:
        return files[general], size[2]
    raise ConfigError(f"the package ultralytics has no architecture {name!r}; {choices(name, _names(files))}")


def _names(stems: Iterable[str]) -> Iterable[str]:
    for stem in stems:
        size = re.fullmatch(r"(yolov?(?:5|8|11|12|26))(-.+)?", stem)
        yield from [f"{size[1]}{letter}{size[2] or ''}" for letter in "nsmlx"] if size else [stem]


def check(where: str, architecture: Any, heads: frozenset[str]) -> str:
    """Refuse an architecture that names anything but building blocks, or that does another task.

    Args:
        where: begins the message.
        architecture: the content of a YAML file.
        heads: names of those that the backend reads.

    Returns:
        The name of its head.

    Raises:
        ConfigError: says which layer is at fault.
    """
    try:
        layers = [*architecture["backbone"], *architecture["head"]]
        *blocks, head = [str(name) for _, _, name, _ in layers]
    except (TypeError, KeyError, ValueError):
        raise ConfigError(
            f"{where}: an architecture has a backbone and a head, lists of [from, repeats, module, args]"
        ) from None
    for index, name in enumerate(blocks):
        if name not in _BLOCKS and not _TORCH_MODULE.fullmatch(name.removeprefix("torch.")):
            raise ConfigError(f"{where}: layer {index} is {name!r}, which is no building block of a YOLO")
    if head not in heads:
        raise ConfigError(
            f"{where}: its head is {head!r}, this backend reads {', '.join(sorted(heads))}; "
            "ultralytics_classifier is for -cls models, and pose, oriented boxes and open vocabularies are not served"
        )
    activation = architecture.get("activation")
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        raise ConfigError(f"{where}: the activation {activation!r} is none of torch.nn's that are known here")
    return head
