"""Results as a line of text."""

from __future__ import annotations

from vision_service.segments import segments_of
from vision_service.types import Classification, Detections, Prediction, Result, SegmentationMap, TranslatedImage


def to_line(result: Result[Prediction]) -> str:
    """A result in a few words."""
    match result.prediction:
        case Classification() as found:
            rows = zip(found.class_names, found.scores.tolist(), strict=True)
            return ", ".join(f"{name} {score:.2f}" for name, score in rows) or "no class"
        case Detections() as found:
            rows = zip(found.class_names, found.scores.tolist(), strict=True)
            return ", ".join(f"{name} {score:.2f}" for name, score in rows) or "nothing found"
        case SegmentationMap() as found:
            pixels = found.class_map.size
            shares = [f"{segment.class_name} {segment.area / pixels:.1%}" for segment in segments_of(found)]
            return ", ".join(shares) or "nothing found"
        case TranslatedImage() as found:
            height, width = found.image.shape[:2]
            return f"image of {width}x{height} pixels"
