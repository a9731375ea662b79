"""Videos with what was found drawn into their frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import cv2

from vision_service.errors import InferenceFailed
from vision_service.imaging.draw import annotate
from vision_service.jobs.items import Item
from vision_service.jobs.outputs.kinds import Model, models_for
from vision_service.jobs.video import Step, frames_of
from vision_service.records import Record, to_prediction
from vision_service.types import UInt8Array


def write_films(
    videos: Iterable[Item], read: Callable[[], Iterator[Record]], folder: Path, models: Sequence[Model], step: Step
) -> None:
    """``videos/NAME.MODEL.mp4``: the frames that were looked at, at their own pace.

    Args:
        videos: the sources that are videos.
        read: the records of the job, from the start.
        folder: where to.
        models: that answered.
        step: which frames were looked at.

    Raises:
        InferenceFailed: this OpenCV cannot write MP4.
    """
    for video in videos:
        for model in models_for("video", models):
            found = {
                record["frame"]: record
                for record in read()
                if record.get("frame") is not None
                and record["file"].rpartition("#")[0] == video.file
                and (record["model"], record["version"]) == (model.name, model.version)
            }
            if found:
                path = folder / "videos" / video.name.with_name(f"{video.name.stem}.{model.name}.mp4")
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_film(video, found, path, model, step)


def _write_film(video: Item, found: dict[int, Record], path: Path, model: Model, step: Step) -> None:
    film: cv2.VideoWriter | None = None
    rate = _rate(video, step)
    try:
        for frame in frames_of(video, step, lambda item: item.frame is not None and item.frame.index in found):
            if frame.frame is None or frame.pixels is None:
                continue
            record = found[frame.frame.index]
            scene = annotate(frame.pixels, to_prediction(record, model.classes))
            if film is None:
                height, width = scene.shape[:2]
                film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
                if not film.isOpened():
                    raise InferenceFailed(f"{path} cannot be written: this OpenCV writes no MP4")
            film.write(cast(UInt8Array, cv2.cvtColor(scene, cv2.COLOR_RGB2BGR)))
    finally:
        if film is not None:
            film.release()


def _rate(video: Item, step: Step) -> float:
    """Frames a second, so that the film lasts as long as the video."""
    if step.seconds is not None:
        return 1.0 / step.seconds
    capture = cv2.VideoCapture(video.file)
    rate: float = capture.get(cv2.CAP_PROP_FPS) or 25.0
    capture.release()
    return rate / (step.frames or 1)
