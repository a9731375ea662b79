"""Compare the Ultralytics backends with the library's own ``predict``, on the same seeded random weights.

Called by scripts/fidelity.py when the package ultralytics (AGPL-3.0) is installed; alone:

    python scripts/fidelity_ultralytics.py [PHOTO...]

Official weights are not at hand, so each network gets batch norms that fit a photo and a head that is sure of
something: what comes out is no sensible detection, but depends on every pixel and every parameter.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())

import cv2
import numpy as np
import torch
from fidelity_page import Page, Run, Section
from torch import Tensor
from ultralytics_random import random_model, save

from vision_service.backends.table import create_backend
from vision_service.config import ModelSpec
from vision_service.engine.build import local_pipeline
from vision_service.imaging.decode import decode_image
from vision_service.imaging.masks import decode_rle
from vision_service.imaging.preprocess import preprocess
from vision_service.types import Classification, Detections, ParamOverrides, Result
from vision_service.zoo.ultralytics import preprocess_of

ARCHITECTURES = (
    *("yolov3-tiny", "yolov5n", "yolov8n", "yolov8n-seg", "yolov8n-cls", "yolov9t", "yolov9c-seg", "yolov10n"),
    *("yolo11n", "yolo11n-seg", "yolo11n-cls", "yolo12n", "yolo26n", "yolo26n-seg", "yolo26n-cls", "rtdetr-l"),
)
SHORT = ("yolov8n", "yolov8n-seg", "yolo26n", "yolo11n-cls")
END_TO_END = ("yolov10n", "yolo26n", "yolo26n-seg")
LEAST_IOU, SCORE_OFF = 0.98, 0.01
"""What is asked of a pair of objects."""

CLASSES = tuple(f"thing {i}" for i in range(80))


def compare(page: Page, run: Run, architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    """A table with a row for each architecture.

    Args:
        page: gets the rows.
        run: whose photos to predict.
        architectures: names that the library knows.
    """
    from importlib.metadata import version

    title = f"Ultralytics {version('ultralytics')}, random weights"
    page.table(title, "same tensor", "objects, ours / theirs", "matched", "least IoU", "score off", "mask pixels equal")
    for arch in run.some(architectures, SHORT):
        for end_to_end in (False, True) if arch in END_TO_END else (False,):
            with tempfile.TemporaryDirectory() as folder:
                _compare_one(page, run.photos, arch, end_to_end, Path(folder))


def _compare_one(page: Page, photos: list[Path], arch: str, end_to_end: bool, folder: Path) -> None:
    from ultralytics import RTDETR, YOLO  # noqa: TID251 - the other side of the comparison

    checkpoint = folder / "network.pt"  # the library would take yolov5n.pt for its yolov5nu.pt, and fetch that
    image = cv2.imread(str(photos[0]))
    save(random_model(arch, image), checkpoint)
    spec = _spec(arch, checkpoint, end_to_end)
    theirs = (RTDETR if arch.startswith("rtdetr") else YOLO)(str(checkpoint))
    # `nms=False` is how the library is asked for the end-to-end half.
    call = {"verbose": False, "device": "cpu", "save": False, "nms": False if end_to_end else None}
    results = [theirs.predict(cv2.imread(str(photo)), **call)[0] for photo in photos]
    off = _same_tensor(spec, theirs.predictor.model.model, photos[0], end_to_end)
    with local_pipeline((), device="cpu") as pipeline:
        pipeline.catalog.load(spec)
        ours = list(pipeline.predict_many(photos, task=spec.task, model=spec.name))
        lower = spec.params.score_threshold - SCORE_OFF
        more = list(
            pipeline.predict_many(
                photos, task=spec.task, model=spec.name, overrides=ParamOverrides(score_threshold=lower)
            )
        )
    name = f"{arch}, end to end" if end_to_end else arch
    if spec.task == "classify":
        _row_classify(page, name, off, ours, results)
    else:
        theirs_more = [theirs.predict(cv2.imread(str(photo)), conf=lower, **call)[0] for photo in photos]
        lone = _lone(ours, theirs_more) + _lone(more, results, turned=True)
        _row_detect(page, name, off, ours, results, lone)


def _spec(arch: str, checkpoint: Path, end_to_end: bool) -> ModelSpec:
    fields = {
        "name": arch,
        "task": "classify" if arch.endswith("-cls") else "detect",
        "backend": "ultralytics_classifier" if arch.endswith("-cls") else "ultralytics_detector",
        "options": {"end_to_end": True} if end_to_end else {},
        "classes": CLASSES,
        "device": "cpu",
        "runtime": "torch",  # the library's
        "batching": {"max_batch_size": 1},
        **preprocess_of(arch),
        "weights": {
            "file": str(checkpoint),
            "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
            "licence": "none",
            "source": "random",
        },
    }
    return ModelSpec.model_validate(fields)


def _same_tensor(spec: ModelSpec, theirs: Any, photo: Path, end_to_end: bool) -> float:
    """The largest difference of the dense outputs on one input; boxes as parts of its longer side."""
    pixels, _ = preprocess(decode_image(photo.read_bytes()), spec.preprocess)
    served: Any = create_backend(spec).build().eval()
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2).contiguous().float() / 255
    # `predict` may have moved its network to channels-last, which rounds otherwise: by 0.05 pixels on these weights.
    theirs = theirs.to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        ours = served.network(images)
        raw = theirs(images)
    while isinstance(raw, tuple | list) and not isinstance(raw[0], Tensor):
        raw = raw[0]
    dense, rest = raw[0], raw[1:2]
    if spec.task == "classify":
        return float((ours[0] - dense).abs().max())
    scale = float(max(pixels.shape))
    if spec.name.startswith("rtdetr"):
        size = torch.tensor([pixels.shape[1], pixels.shape[0]] * 2)
        return _listed_off(ours[0][0], torch.cat((_corners(dense[0, :, :4]) * size, dense[0, :, 4:]), dim=1), scale)
    if end_to_end:
        return _listed_off(ours[0][0], dense[0], scale)
    rows, classes = dense.transpose(1, 2), len(CLASSES)
    pairs = [(ours[0] / scale, _corners(rows[..., :4]) / scale), (ours[1], rows[..., 4 : 4 + classes])]
    if spec.name.endswith("-seg"):
        pairs += [(ours[2], rows[..., 4 + classes :]), (ours[3], rest[0])]
    return max(float((a - b).abs().max()) for a, b in pairs)


def _listed_off(ours: Tensor, theirs: Tensor, scale: float) -> float:
    """Of rows that pass the threshold: each to the nearest there, for near ties change places in a list."""
    wanted = ours[ours[:, 4] >= 0.25, :6] / torch.tensor([*[scale] * 4, 1.0, 1.0])
    if not len(wanted):
        return 0.0
    there = theirs[:, :6] / torch.tensor([*[scale] * 4, 1.0, 1.0])
    return float((wanted[:, None] - there[None]).abs().amax(dim=2).amin(dim=1).max())


def _corners(xywh: Tensor) -> Tensor:
    from ultralytics.utils.ops import xywh2xyxy  # noqa: TID251

    corners: Tensor = xywh2xyxy(xywh)
    return corners


def _row_classify(page: Page, name: str, off: float, ours: list[Any], theirs: list[Any]) -> None:
    same = 0
    largest = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        found = _prediction(mine, Classification)
        same += int(found.class_ids[0] == other.probs.top1)
        expected = other.probs.data.numpy()[found.class_ids]
        largest = max(largest, float(np.abs(found.scores - expected).max()))
    ok = same == len(ours) and largest <= 0.01 and off <= 1e-4
    page.row(name, f"{off:.1e}", "", f"top-1 of {same} of {len(ours)}", "", f"{largest:.4f}", "", ok=ok)


def _seen(result: Any, original_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Theirs without boxes that lie in the padding and have no area: boxes, scores, class ids, and which they are."""
    boxes = result.boxes.xyxy.numpy().clip(0, [original_hw[1], original_hw[0]] * 2)
    kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    return boxes[kept], result.boxes.conf.numpy()[kept], result.boxes.cls.numpy().astype(int)[kept], kept


def _lone(ours: list[Any], theirs: list[Any], *, turned: bool = False) -> int:
    """How many objects of ours (``turned``: of theirs) the other side does not have, though its threshold is lower."""
    lone = 0
    for mine, other in zip(ours, theirs, strict=True):
        found = _prediction(mine, Detections)
        boxes, scores, classes, _ = _seen(other, mine.original_hw)
        pairs = match(found.boxes_xyxy, found.class_ids, boxes, classes)
        good = sum(overlap >= LEAST_IOU and abs(found.scores[i] - scores[j]) <= SCORE_OFF for i, j, overlap in pairs)
        lone += (len(boxes) if turned else len(found)) - good
    return lone


def _row_detect(page: Page, name: str, off: float, ours: list[Any], theirs: list[Any], lone: int) -> None:
    counts, matched, least, largest, equal = [0, 0], 0, 1.0, 0.0, 1.0
    for mine, other in zip(ours, theirs, strict=True):
        found, original_hw = _prediction(mine, Detections), mine.original_hw
        boxes, scores, classes, kept = _seen(other, original_hw)
        counts[0] += len(found)
        counts[1] += len(boxes)
        for index, partner, overlap in match(found.boxes_xyxy, found.class_ids, boxes, classes):
            matched += 1
            least = min(least, overlap)
            largest = max(largest, abs(float(found.scores[index] - scores[partner])))
            if found.mask_rles is not None:
                mask = decode_rle(found.mask_rles[index], original_hw)
                equal = min(equal, float((mask == _their_mask(other, int(kept[partner]), original_hw)).mean()))
    ok = lone == 0 and least >= LEAST_IOU and largest <= SCORE_OFF and equal >= 0.995 and off <= 1e-4
    at_threshold = f", {sum(counts) - 2 * matched} at the threshold" if sum(counts) > 2 * matched else ""
    pixels = f"{100 * equal:.3f} %" if any(r.masks is not None for r in theirs) else ""
    page.row(
        name,
        f"{off:.1e}",
        f"{counts[0]} / {counts[1]}",
        f"{matched}{at_threshold}",
        f"{least:.4f}",
        f"{largest:.1e}",
        pixels,
        ok=ok,
    )


def _their_mask(result: Any, index: int, original_hw: tuple[int, int]) -> np.ndarray:
    from ultralytics.utils.ops import scale_masks  # noqa: TID251

    mask: np.ndarray = scale_masks(result.masks.data[None, index : index + 1].float(), original_hw)[0, 0].numpy()
    return mask > 0.5


def match(
    boxes: np.ndarray, classes: np.ndarray, other_boxes: np.ndarray, other_classes: np.ndarray
) -> list[tuple[int, int, float]]:
    """Pairs of one class, the largest overlaps first, each box once.

    Args:
        boxes: ``[N, 4]``, x1, y1, x2, y2.
        classes: ``[N]``.
        other_boxes: ``[M, 4]``.
        other_classes: ``[M]``.

    Returns:
        Index here, index there, IoU.
    """
    low = np.maximum(boxes[:, None, :2], other_boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], other_boxes[None, :, 2:])
    inside = (high - low).clip(0).prod(axis=2)
    areas = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, other_boxes)]
    overlap = inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-9)
    overlap[classes[:, None] != other_classes[None]] = -1.0
    pairs = []
    for _ in range(min(overlap.shape)):
        index, partner = np.unravel_index(overlap.argmax(), overlap.shape)
        if overlap[index, partner] < 0.5:
            break
        pairs.append((int(index), int(partner), float(overlap[index, partner])))
        overlap[index, :] = overlap[:, partner] = -1.0
    return pairs


def _prediction(result: Any, kind: type) -> Any:
    if not isinstance(result, Result) or not isinstance(result.prediction, kind):
        raise SystemExit(f"no {kind.__name__}: {result}")
    return result.prediction


AGAINST = """\
- **Ultralytics** (AGPL-3.0, in a folder of its own: `make fidelity YOLO=no` leaves it out): its own `predict` with its
  defaults, with seeded random weights on both sides, since the official ones have to be fetched. "Same tensor" is the
  largest difference of what the heads return, boxes as parts of the input's longer side. Masks of ours are those of
  `Results.masks`, taken to the photo's size by the library's `scale_masks` and cut at one half. Ours leaves out boxes
  that have no area inside the photo, and keeps a score that is equal to the threshold, on purpose. Required are the
  same objects of equal class (IoU 0.98, score within 0.01), masks with 99.5 % equal pixels, equal top-1 classes, and
  1e-4 on the same tensor. An object whose score lies at the threshold may be reported by one side alone: only if the
  other side, asked with a threshold that is 0.01 lower, reports the same one. So it is with YOLOv9-t: the 262nd object
  of astronaut.jpg scores 0.25001 when the library computes it in float64, 0.24999 as its `predict` computes it (memory
  channels-last), 0.25027 by its same network with contiguous memory, and 0.25023 by ours. Ours runs in torch, as the
  library does, and not in the runtime that `auto` takes: random weights make boxes whose scores hardly differ, and in
  OpenVINO suppression kept another one of two for YOLO11n, one object of 262 (docs/runtimes.md has other runtimes).
"""

SECTION = Section("ultralytics", compare, AGAINST, short=", ".join(SHORT), needs="ultralytics")


if __name__ == "__main__":
    named = [Path(name) for name in sys.argv[1:] if name.endswith((".jpg", ".png"))]
    chosen = tuple(name for name in sys.argv[1:] if not name.endswith((".jpg", ".png")))
    samples = sorted((Path(__file__).resolve().parent.parent / "samples").glob("*.jpg"))
    compare(Page(), Run(Path(), named or samples), chosen or ARCHITECTURES)
