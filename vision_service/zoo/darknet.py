"""Darknet's own detectors, trained on COCO: YOLOv3, YOLOv4 and their variants, from their authors' addresses.

Hashes of the weights are those that independent projects agree on, since the authors publish none; lengths follow from
the cfg. Preprocessing is that of the program each was published with: pjreddie's Darknet keeps the aspect ratio on
grey, AlexeyAB's stretches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from vision_service.config import (
    BatchingSpec,
    FileSpec,
    Letterbox,
    ModelSpec,
    PreprocessSpec,
    Stretch,
    WeightsSpec,
)
from vision_service.types import Params, Task
from vision_service.weights.manifest import embedded_manifest

_PJREDDIE = "https://raw.githubusercontent.com/pjreddie/darknet/master/cfg"
_ALEXEYAB = "https://raw.githubusercontent.com/AlexeyAB/darknet/master/cfg"
_RELEASES = "https://github.com/AlexeyAB/darknet/releases/download"

LICENCE = "LicenseRef-YOLO"
"""Darknet's LICENSE, "YOLO LICENSE Version 2": Darknet is public domain."""


@dataclass(frozen=True)
class _Entry:
    """What is known of a network's two files.

    Attributes:
        side: height and width of the input, pixels, which the authors give their figures for.
        cfg: folder of the cfg's address.
        weights: address of the weights.
        sha256: of the weights; empty where nobody names it.
        cfg_sha256: likewise.
        size_bytes: of the weights.
    """

    side: int
    cfg: str
    weights: str
    sha256: str = ""
    cfg_sha256: str = ""
    size_bytes: int | None = None


_ENTRIES = {
    "yolov3": _Entry(
        416,
        _PJREDDIE,
        "https://pjreddie.com/media/files/yolov3.weights",
        "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
        "22489ea38575dfa36c67a90048e8759576416a79d32dc11e15d2217777b9a953",
        248007048,
    ),
    "yolov3-spp": _Entry(
        608,
        _PJREDDIE,
        "https://pjreddie.com/media/files/yolov3-spp.weights",
        "87a1e8c85c763316f34e428f2295e1db9ed4abcec59dd9544f8052f50de327b4",
        "7a4ec2d7427340fb12059f2b0ef76d6fcfcac132cc287cbbf0be5e3abaa856fd",
    ),
    "yolov3-tiny": _Entry(
        416,
        _PJREDDIE,
        "https://pjreddie.com/media/files/yolov3-tiny.weights",
        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
        "84eb7a675ef87c906019ff5a6e0effe275d175adb75100dcb47f0727917dc2c7",
        35434956,
    ),
    "yolov4": _Entry(
        608,
        _ALEXEYAB,
        f"{_RELEASES}/darknet_yolo_v3_optimal/yolov4.weights",
        "e8a4f6c62188738d86dc6898d82724ec0964d0eb9d2ae0f0a9d53d65d108d562",
        "a6d0f8e5c62cc8378384f75a8159b95fa2964d4162e33351b00ac82e0fc46a34",
        257717640,
    ),
    "yolov4-csp": _Entry(640, _ALEXEYAB, f"{_RELEASES}/darknet_yolo_v4_pre/yolov4-csp.weights"),
    "yolov4-tiny": _Entry(
        416,
        _ALEXEYAB,
        f"{_RELEASES}/darknet_yolo_v4_pre/yolov4-tiny.weights",
        "cf9fbfd0f6d4869b35762f56100f50ed05268084078805f0e7989efe5bb8ca87",
        "f858e3724962eedf3ac44e3b6cb3f0c3d9ed067c306bb831f539c578b924c90e",
        24251276,
    ),
}


def names() -> list[str]:
    """Every network that the table has."""
    return list(_ENTRIES)


@cache
def spec(name: str, version: str = "") -> ModelSpec | None:
    """A network of the table.

    Args:
        name: such as ``yolov4``.
        version: empty or ``1``: there is one.
    """
    entry = _ENTRIES.get(name)
    if entry is None or version not in ("", "1"):
        return None
    side = (entry.side, entry.side)
    # 0.5 in pjreddie's `letterbox_image`.
    resize = Letterbox(size_hw=side, fill=(128, 128, 128)) if entry.cfg == _PJREDDIE else Stretch(size_hw=side)
    return ModelSpec(
        name=name,
        task=Task.DETECT,
        backend="darknet",
        options={"size_hw": [entry.side, entry.side]},
        classes=tuple((embedded_manifest().parent / "classes" / "coco80.txt").read_text(encoding="utf-8").splitlines()),
        preprocess=PreprocessSpec(resize=resize, interpolation="bilinear"),
        params=Params(score_threshold=0.25, iou_threshold=0.45),
        batching=BatchingSpec(max_batch_size=8),
        weights=WeightsSpec(
            file=f"{name}.weights",
            url=entry.weights,
            sha256=entry.sha256,
            size_bytes=entry.size_bytes,
            licence=LICENCE,
            source=entry.weights,
            companions=(FileSpec(file=f"{name}.cfg", url=f"{entry.cfg}/{name}.cfg", sha256=entry.cfg_sha256),),
        ),
    )
