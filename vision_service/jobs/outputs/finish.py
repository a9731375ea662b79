"""What is made of ``results.jsonl`` when a job is through: each file is whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vision_service.imaging.decode import DecodeLimits
from vision_service.jobs.journal import RESULTS
from vision_service.jobs.outputs import coco, film, sheet, tables
from vision_service.jobs.outputs.kinds import Model
from vision_service.jobs.sources import list_files
from vision_service.jobs.video import Step
from vision_service.records import Record

_UNFINISHED = ".outputs.new"


@dataclass(frozen=True, slots=True)
class Finish:
    """The outputs that are made at the end.

    Attributes:
        kinds: chosen outputs; those that are written image by image are left to others.
        models: that answered.
        sources: of the job, whose videos are read again.
        step: which frames were looked at.
        limits: of images that are read again.
        coco_ids: a dataset's, for ``coco``.
    """

    kinds: Sequence[str]
    models: Sequence[Model]
    sources: Sequence[str] = ()
    step: Step = field(default_factory=Step)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    coco_ids: coco.Ids | None = None

    def write(self, folder: Path) -> None:
        """Make them of the records in a folder, beside those."""
        unfinished = folder / _UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for kind in self.kinds:
            self._write(kind, folder, unfinished)
        for made in sorted(path for path in unfinished.rglob("*") if path.is_file()):
            place = folder / made.relative_to(unfinished)
            place.parent.mkdir(parents=True, exist_ok=True)
            made.replace(place)
        shutil.rmtree(unfinished)

    def _write(self, kind: str, folder: Path, into: Path) -> None:
        def read() -> Iterator[Record]:
            return read_records(folder / RESULTS)

        match kind:
            case "parquet":
                tables.write_parquet(read(), into / "results.parquet")
            case "parquet-flat":
                tables.write_parquet_flat(read(), into / "results_flat.parquet")
            case "csv":
                tables.write_csv(read(), into / "results.csv")
            case "coco":
                coco.write_coco(read(), into, self.models, self.coco_ids)
            case "rle":
                coco.write_rle(read(), into)
            case "html":
                sheet.write_sheet(read(), into / "results.html", self.models, self.limits)
            case "video":
                videos = (file for file in list_files(self.sources) if file.is_video)
                film.write_films(videos, read, into, self.models, self.step)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file of JSON lines, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
