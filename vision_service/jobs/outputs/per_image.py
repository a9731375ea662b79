"""Files about one image: annotated pictures, class maps, YOLO's text files, crops."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import cv2

from vision_service.imaging.draw import annotate
from vision_service.imaging.encode import encode_image
from vision_service.jobs.items import Outcome
from vision_service.jobs.outputs.kinds import KINDS, Model, models_for
from vision_service.types import Detections, Prediction, Result, SegmentationMap, TranslatedImage, UInt8Array

LABELS, CLASS_MAPS, CROPS = "labels", "class-maps", "crops"


class ImageFiles:
    """Writes the files that were chosen, for one outcome at a time. Threads may share it.

    Args:
        folder: where they go.
        kinds: chosen outputs; those that are not per image are left to others.
        models: that answer.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], models: Sequence[Model]) -> None:
        self._folder = folder
        self._writers = {name: _WRITERS[name] for name in kinds if KINDS[name].per_image}
        self.needs_image = any(KINDS[name].needs_image for name in self._writers)
        self._several_detectors = len(models_for("yolo", models)) > 1
        if "yolo" in self._writers:
            for model in models_for("yolo", models):
                names = self._folder / LABELS / (_plain(model.name) if self._several_detectors else "") / "classes.txt"
                names.parent.mkdir(parents=True, exist_ok=True)
                names.write_text("".join(f"{name}\n" for name in model.classes), encoding="utf-8")

    @property
    def wanted(self) -> bool:
        """Whether anything is written about an image."""
        return bool(self._writers)

    def write(self, outcome: Outcome, stem: PurePosixPath) -> None:
        """Write what was chosen about an image.

        Args:
            outcome: with its image where that is needed.
            stem: the image's place below the folder.
        """
        for result in outcome.results:
            for writer in self._writers.values():
                writer(self, stem, result, outcome.image)

    def picture(self, stem: PurePosixPath, result: Result[Prediction], image: UInt8Array | None) -> None:
        """The image with what was found; of a model that makes images, that image without loss."""
        name = f"{stem.name}.{_plain(result.model_name)}"
        if isinstance(result.prediction, TranslatedImage):
            self._save(self._folder / stem.with_name(name + ".png"), encode_image(result.prediction.image, "png"))
        elif image is not None:
            drawn = encode_image(annotate(image, result.prediction), "jpeg", 90)
            self._save(self._folder / stem.with_name(name + ".jpg"), drawn)

    def class_map(self, stem: PurePosixPath, result: Result[Prediction], _image: UInt8Array | None) -> None:
        """Grey PNG of the image's size whose values are class ids; 255 where there is none."""
        if isinstance(result.prediction, SegmentationMap):
            path = self._folder / CLASS_MAPS / stem.with_name(f"{stem.name}.{_plain(result.model_name)}.png")
            self._save(path, cv2.imencode(".png", result.prediction.class_map)[1].tobytes())

    def yolo(self, stem: PurePosixPath, result: Result[Prediction], _image: UInt8Array | None) -> None:
        """A line a box: class id, centre x and y, width and height as shares of the image, and the score."""
        if not isinstance(result.prediction, Detections):
            return
        height, width = result.original_hw
        lines = []
        rows = zip(
            result.prediction.class_ids.tolist(),
            result.prediction.boxes_xyxy.tolist(),
            result.prediction.scores.tolist(),
            strict=True,
        )
        for class_id, (left, top, right, bottom), score in rows:
            center = (left + right) / 2 / width, (top + bottom) / 2 / height
            size = (right - left) / width, (bottom - top) / height
            lines.append(f"{class_id} {' '.join(f'{value:.6f}' for value in (*center, *size, score))}\n")
        below = _plain(result.model_name) if self._several_detectors else ""
        self._save(self._folder / LABELS / below / stem.with_name(f"{stem.name}.txt"), "".join(lines).encode())

    def crops(self, stem: PurePosixPath, result: Result[Prediction], image: UInt8Array | None) -> None:
        """A JPEG a box, highest score first: ``000_person.jpg``. Boxes with no pixel have none."""
        if not isinstance(result.prediction, Detections) or image is None:
            return
        folder = self._folder / CROPS / stem.with_name(f"{stem.name}.{_plain(result.model_name)}")
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier answer, which may have had more
        boxes = result.prediction.boxes_xyxy.round().astype(int).tolist()
        for rank, ((left, top, right, bottom), name) in enumerate(
            zip(boxes, result.prediction.class_names, strict=True)
        ):
            piece = image[max(0, top) : bottom, max(0, left) : right]
            if piece.size:
                self._save(folder / f"{rank:03d}_{_plain(name)}.jpg", encode_image(piece, "jpeg", 90))

    def _save(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_bytes(content)
        unfinished.replace(path)


_WRITERS: dict[str, Callable[[ImageFiles, PurePosixPath, Result[Prediction], UInt8Array | None], None]] = {
    "pictures": ImageFiles.picture,
    "class-map": ImageFiles.class_map,
    "yolo": ImageFiles.yolo,
    "crops": ImageFiles.crops,
}


def _plain(name: str) -> str:
    """A name that comes from a model or a server, as a part of a path."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)
