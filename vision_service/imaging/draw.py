"""Predictions drawn onto the image, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_service.imaging.masks import decode_rle
from vision_service.types import (
    VOID,
    Classification,
    Detections,
    Float32Array,
    Prediction,
    SegmentationMap,
    TranslatedImage,
    UInt8Array,
)

# supervision brings matplotlib and takes a second to import: only where something is drawn.

_MASK_OPACITY = 0.5
_LARGEST_LISTED_CLASSES = 8


def annotate(image: UInt8Array, prediction: Prediction) -> UInt8Array:
    """The image with a prediction drawn onto it; lines and text grow with the image.

    Args:
        image: uint8 ``[H, W, 3]`` RGB, the one that was predicted on; it is not changed.
        prediction: in pixels of that image.

    Returns:
        uint8 ``[H, W, 3]`` RGB: boxes with names and scores, over translucent masks where there are any; a translucent
        mask per class with a legend; or the likeliest classes as lines of text. A `TranslatedImage` is returned as it
        is, in its own size.

    Raises:
        ValueError: a segmentation map, or the mask of an object, of another size than the image.
    """
    match prediction:
        case Detections():
            return _draw_detections(image, prediction)
        case SegmentationMap():
            return _draw_segments(image, prediction)
        case Classification():
            lines = [
                (f"{name} {score:.0%}", None)
                for name, score in zip(prediction.class_names, prediction.scores.tolist(), strict=True)
            ]
            return _draw_lines(image, lines)
        case TranslatedImage():
            return prediction.image


def _draw_detections(image: UInt8Array, prediction: Detections) -> UInt8Array:
    import supervision as sv

    # Highest score last, so that it is drawn over the others.
    detections = sv.Detections(
        xyxy=prediction.boxes_xyxy[::-1], class_id=prediction.class_ids[::-1], confidence=prediction.scores[::-1]
    )
    labels = [
        f"{name} {score:.0%}"
        for name, score in zip(prediction.class_names[::-1], prediction.scores[::-1].tolist(), strict=True)
    ]
    scale, thickness = _text_scale(image), _line_width(image)
    scene = sv.BoxAnnotator(color=_palette(), thickness=thickness).annotate(_with_masks(image, prediction), detections)
    below = _names_below(prediction.boxes_xyxy[::-1], 60 * scale)
    for where, chosen in ((sv.Position.TOP_LEFT, ~below), (sv.Position.BOTTOM_LEFT, below)):
        writer = sv.LabelAnnotator(
            color=_palette(),
            text_color=sv.Color.BLACK,
            text_scale=scale,
            text_thickness=max(1, round(scale * 1.5)),
            text_padding=max(2, round(scale * 8)),
            text_position=where,
            smart_position=True,  # otherwise the name of a box at the edge is cut off
        )
        names = [label for label, wanted in zip(labels, chosen, strict=True) if wanted]
        if names:
            scene = writer.annotate(scene, cast(sv.Detections, detections[chosen]), names)
    return _rgb(scene)


def _names_below(boxes_xyxy: Float32Array, near: float) -> NDArray[np.bool_]:
    """Which boxes have their name at the lower edge: those that start where a higher-scored one (a later row) starts.

    Args:
        boxes_xyxy: float32 ``[N, 4]``, lowest score first.
        near: upper left corners that are closer than this, in pixels, would have their names on each other.

    Returns:
        bool ``[N]``.
    """
    below = np.zeros(len(boxes_xyxy), bool)
    for index in range(len(boxes_xyxy) - 1, -1, -1):
        above = boxes_xyxy[index + 1 :][~below[index + 1 :], :2]
        below[index] = bool((np.abs(above - boxes_xyxy[index, :2]) < near).all(axis=1).any())
    return below


def _with_masks(image: UInt8Array, prediction: Detections) -> UInt8Array:
    """BGR, with the objects' masks. One at a time: a hundred masks of a large photo need not be in memory together."""
    import supervision as sv

    scene = _bgr(image)
    size_hw = (image.shape[0], image.shape[1])
    annotator = sv.MaskAnnotator(color=_palette(), opacity=_MASK_OPACITY)
    for index in reversed(range(len(prediction.mask_rles or ()))):
        assert prediction.mask_rles is not None, "the loop is empty otherwise"
        one = sv.Detections(
            xyxy=prediction.boxes_xyxy[index : index + 1],
            mask=decode_rle(prediction.mask_rles[index], size_hw)[None],
            class_id=prediction.class_ids[index : index + 1],
        )
        scene = annotator.annotate(scene, one)
    return scene


def _draw_segments(image: UInt8Array, prediction: SegmentationMap) -> UInt8Array:
    import supervision as sv

    if prediction.class_map.shape != image.shape[:2]:
        raise ValueError(
            f"need a map of the image's size {image.shape[:2]}, got {prediction.class_map.shape}: draw on the original"
        )
    areas = prediction.areas()
    found = [i for i in np.argsort(-areas).tolist() if areas[i] > 0 and i not in (VOID, prediction.background_id)]
    if not found:
        return image.copy()
    class_ids = np.array(found)
    detections = sv.Detections(
        xyxy=np.zeros((len(found), 4), np.float32),
        mask=np.stack([prediction.mask(i) for i in found]),
        class_id=class_ids,
    )
    scene = sv.MaskAnnotator(color=_palette(), opacity=_MASK_OPACITY).annotate(_bgr(image), detections)
    lines = [(prediction.class_names[i], i) for i in found[:_LARGEST_LISTED_CLASSES]]
    return _draw_lines(_rgb(scene), lines)


def _draw_lines(image: UInt8Array, lines: Sequence[tuple[str, int | None]]) -> UInt8Array:
    """Lines of text on a dark panel in the top-left corner, each with its class's colour in front if it has one."""
    scale = _text_scale(image)
    thickness = max(1, round(scale * 1.5))
    canvas = image.copy()
    if not lines:
        return canvas
    font = cv2.FONT_HERSHEY_SIMPLEX
    sizes = [cv2.getTextSize(text, font, scale, thickness)[0] for text, _ in lines]
    line_height = round(max(height for _, height in sizes) * 1.8)
    pad = round(line_height * 0.4)
    swatch = line_height if any(class_id is not None for _, class_id in lines) else 0
    height, width = line_height * len(lines) + pad, max(width for width, _ in sizes) + swatch + 2 * pad
    panel = canvas[:height, :width]
    panel[:] = panel // 4  # white text is read on whatever is below
    for row, (text, class_id) in enumerate(lines):
        baseline = pad // 2 + round(line_height * (row + 0.78))
        if class_id is not None:
            side = round(line_height * 0.55)
            corner = (pad, baseline - side)
            cv2.rectangle(canvas, corner, (pad + side, baseline), _palette().by_idx(class_id).as_rgb(), cv2.FILLED)
        cv2.putText(canvas, text, (pad + swatch, baseline), font, scale, (255, 255, 255), thickness, cv2.LINE_AA)
    return canvas


def _palette() -> Any:
    import supervision as sv

    return sv.ColorPalette.DEFAULT


def _short_side(image: UInt8Array) -> int:
    return int(min(image.shape[:2]))


def _line_width(image: UInt8Array) -> int:
    return max(1, round(_short_side(image) / 240))


def _text_scale(image: UInt8Array) -> float:
    return max(0.3, _short_side(image) / 800)


def _bgr(image: UInt8Array) -> UInt8Array:
    return cast(UInt8Array, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def _rgb(scene: UInt8Array) -> UInt8Array:
    return cast(UInt8Array, cv2.cvtColor(scene, cv2.COLOR_BGR2RGB))
