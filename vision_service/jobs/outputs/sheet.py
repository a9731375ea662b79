"""A page with the images that a model is least and most sure of."""

from __future__ import annotations

import base64
import heapq
import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2

from vision_service.errors import InvalidImage
from vision_service.imaging.decode import DecodeLimits
from vision_service.imaging.draw import annotate
from vision_service.imaging.encode import encode_image
from vision_service.jobs.outputs.again import image_of
from vision_service.jobs.outputs.kinds import Model, models_for
from vision_service.records import Record, to_prediction

SHOWN = 24
"""Images at either end."""

_SIDE = 320

_STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222;background:#fff}
section{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:12px}
figure{margin:0}img{width:100%;border-radius:4px}figcaption{overflow-wrap:anywhere;font-size:12px}"""


@dataclass(slots=True)
class _Ends:
    """The lowest and the highest of a stream; of equal ones the first."""

    seen: int = 0
    low: list[tuple[float, int, Record]] = field(default_factory=list)
    high: list[tuple[float, int, Record]] = field(default_factory=list)

    def add(self, score: float, record: Record) -> None:
        for heap, key in ((self.low, -score), (self.high, score)):
            keep = heapq.heappush if len(heap) < SHOWN else heapq.heappushpop
            keep(heap, (key, -self.seen, record))
        self.seen += 1

    def worst(self) -> list[tuple[float, Record]]:
        return [(-key, record) for key, _, record in sorted(self.low, key=lambda one: one[:2], reverse=True)]

    def best(self) -> list[tuple[float, Record]]:
        return [(key, record) for key, _, record in sorted(self.high, key=lambda one: one[:2], reverse=True)]


def write_sheet(records: Iterable[Record], path: Path, models: Sequence[Model], limits: DecodeLimits) -> None:
    """One HTML file with its pictures inside. An image counts as its highest score, 0 where nothing was found.

    Args:
        records: of a job.
        path: where to.
        models: that answered.
        limits: of images that are read again.
    """
    ends = {(model.name, model.version): _Ends() for model in models_for("html", models)}
    for record in records:
        found = record.get("detections", record.get("classes"))
        if found is not None and (record["model"], record["version"]) in ends:
            score = max((one["score"] for one in found), default=0.0)
            ends[record["model"], record["version"]].add(score, record)
    with path.open("w", encoding="utf-8") as file:
        file.write(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Results</title><style>{_STYLE}</style>'
        )
        for (name, version), of_model in ends.items():
            file.write(f"<h1>{html.escape(name)} {html.escape(version)}</h1>\n<p>{of_model.seen} images</p>\n")
            for title, some in (("The worst", of_model.worst()), ("The best", of_model.best())):
                file.write(f"<h2>{title}: {len(some)} with the {'lowest' if title == 'The worst' else 'highest'} score")
                file.write("</h2>\n<section>\n")
                file.writelines(_figures(some, limits))
                file.write("</section>\n")
        file.write("</html>\n")


def _figures(some: Iterable[tuple[float, Record]], limits: DecodeLimits) -> Iterator[str]:
    for score, record in some:
        try:
            image = annotate(image_of(record, limits), to_prediction(record))
            scale = min(1.0, _SIDE / max(image.shape[:2]))
            small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            content = base64.b64encode(encode_image(small.astype("uint8"), "jpeg", 80)).decode()
            picture = f'<img alt="" src="data:image/jpeg;base64,{content}">'
        except InvalidImage as error:
            picture = f"<p>{html.escape(str(error))}</p>"
        yield f"<figure>{picture}<figcaption>{score:.3f} {html.escape(record['file'])}</figcaption></figure>\n"
