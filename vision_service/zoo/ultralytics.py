"""Models of the package ultralytics (AGPL-3.0): names, official files, classes, preprocessing of its ``predict``.

Nothing of that package is imported here. Its files are pickles whose hashes nobody publishes: they load when the user
trusts them (``--trust``) or has registered their sha256 (``models add``).
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from vision_service.config import ModelSpec
from vision_service.weights.manifest import embedded_manifest

RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.4.0"
"""Where the library's ``utils/downloads.py`` fetches its files."""

_SIZES = "nsmlx"


def _files() -> dict[str, str]:
    """File's stem -> architecture, in the order of ``GITHUB_ASSETS_NAMES``."""
    found = {f"yolov3{kind}u": f"yolov3{kind}" for kind in ("", "-spp", "-tiny")}
    found |= {f"yolov5{size}u": f"yolov5{size}" for size in _SIZES}
    found |= {f"yolov5{size}6u": f"yolov5{size}-p6" for size in _SIZES}
    plain = [f"yolov9{size}{kind}" for kind in ("", "-seg") for size in ("tsmce" if not kind else "ce")]
    plain += [f"yolov10{size}" for size in "nsmblx"] + [f"yolo12{size}" for size in _SIZES]
    plain += [
        f"{family}{size}{kind}"
        for family in ("yolov8", "yolo11", "yolo26")
        for kind in ("", "-seg", "-cls")
        for size in _SIZES
    ]
    return found | {name: name for name in [*plain, "rtdetr-l", "rtdetr-x"]}


FILES = _files()


def names() -> list[str]:
    """Every model with an official file; none while the package ultralytics is not installed."""
    return sorted(FILES) if find_spec("ultralytics") is not None else []


def spec(name: str, version: str = "") -> ModelSpec | None:
    """One of them. Known whether or not the package is installed: the backend says what is missing.

    Args:
        name: such as ``yolo11n-seg``; the stem of the official file.
        version: empty or ``1``: each has one file.
    """
    if name not in FILES or version not in ("", "1"):
        return None
    return ModelSpec.model_validate(
        {
            "name": name,
            "task": "classify" if name.endswith("-cls") else "detect",
            "backend": "ultralytics_classifier" if name.endswith("-cls") else "ultralytics_detector",
            "options": {"arch": FILES[name]},
            "classes": _classes("imagenet1k.txt" if name.endswith("-cls") else "coco80.txt"),
            "weights": {
                "file": f"{name}.pt",
                "url": f"{RELEASE}/{name}.pt",
                "licence": "AGPL-3.0",
                "source": f"Ultralytics, {RELEASE}/{name}.pt",
            },
            **preprocess_of(FILES[name]),
        }
    )


def preprocess_of(arch: str) -> dict[str, Any]:
    """What the library's ``predict`` does before and after an architecture, as fields of a spec.

    A single photo is letterboxed into the smallest rectangle of the network's stride; RT-DETR's is stretched. Defaults
    are those of its ``cfg/default.yaml``.

    Args:
        arch: an architecture of the library, such as ``yolov8n-seg``.

    Returns:
        ``preprocess`` and ``params``.
    """
    if arch.endswith("-cls"):
        crop = {"mode": "shortest_side_crop", "shortest_side": 224, "crop_hw": (224, 224)}
        return {"preprocess": {"resize": crop, "interpolation": "antialias"}, "params": {"top_k": 5}}
    size, stride = (1280, 64) if re.search(r"-p6\b", arch) else (640, 32)
    resize: dict[str, Any] = {"mode": "letterbox", "size_hw": (size, size), "pad_multiple": stride}
    if arch.startswith("rtdetr"):
        resize = {"mode": "stretch", "size_hw": (size, size)}
    return {
        "preprocess": {"resize": resize, "interpolation": "bilinear"},
        "params": {"score_threshold": 0.25, "iou_threshold": 0.7, "max_detections": 300},
    }


def _classes(file: str) -> tuple[str, ...]:
    lines = (embedded_manifest().parent / "classes" / file).read_text(encoding="utf-8").splitlines()
    return tuple(lines)
