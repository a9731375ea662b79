"""Tables of results: Parquet with a row an image or a row an object, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from vision_service.errors import ConfigError
from vision_service.records import Record

FLAT_COLUMNS = (
    *("file", "frame", "time_s", "model", "version", "task", "height", "width"),
    *("rank", "class_id", "class_name", "score", "area", "x1", "y1", "x2", "y2", "mask"),
)
"""``rank`` counts what was found in an image from 0; what a task does not have is empty."""

_LISTS = {"classify": "classes", "detect": "detections", "segment": "segments"}
_ROWS_AT_ONCE = 1000


def write_parquet(records: Iterable[Record], path: Path) -> None:
    """A row an image and a model, its objects nested; see `nested_schema`."""
    _write_parquet(map(nested_row, records), nested_schema(), path)


def write_parquet_flat(records: Iterable[Record], path: Path) -> None:
    """A row an object; see `FLAT_COLUMNS`."""
    _write_parquet((row for record in records for row in flat_rows(record)), flat_schema(), path)


def write_csv(records: Iterable[Record], path: Path) -> None:
    """A row an object, with a heading; see `FLAT_COLUMNS`. A mask is COCO's run lengths as text."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FLAT_COLUMNS)
        writer.writeheader()
        for record in records:
            writer.writerows(flat_rows(record))


def nested_row(record: Record) -> dict[str, Any]:
    """A record as a row of `nested_schema`: a mask is its run lengths, whose size is the image's."""
    row = {name: record.get(name) for name in (*FLAT_COLUMNS[:8], *_LISTS.values(), "image")}
    for key in ("detections", "segments"):
        if key in record:
            row[key] = [{**one, "mask": one["mask"]["counts"] if "mask" in one else None} for one in record[key]]
    return row


def flat_rows(record: Record) -> Iterator[dict[str, Any]]:
    """A record as rows of `FLAT_COLUMNS`, one a class, a box or a segment."""
    about = {name: record.get(name) for name in FLAT_COLUMNS[:8]}
    for rank, one in enumerate(record.get(_LISTS.get(record["task"], ""), ())):
        box = dict(zip(("x1", "y1", "x2", "y2"), one.get("box", (None,) * 4), strict=True))
        row = {**about, "rank": rank, **{name: one.get(name) for name in FLAT_COLUMNS[9:13]}, **box}
        yield {**row, "mask": one["mask"]["counts"] if "mask" in one else None}


def nested_schema() -> Any:
    """Columns of a row an image. Of ``classes``, ``detections``, ``segments`` and ``image`` one is there, by task."""
    pa = _arrow()
    of_class = [("class_id", pa.int64()), ("class_name", pa.string())]
    placed = [("box", pa.list_(pa.float64())), ("mask", pa.string())]
    return pa.schema(
        [
            *_about(pa),
            ("classes", pa.list_(pa.struct([*of_class, ("score", pa.float64())]))),
            ("detections", pa.list_(pa.struct([*of_class, ("score", pa.float64()), *placed]))),
            ("segments", pa.list_(pa.struct([*of_class, ("area", pa.int64()), *placed]))),
            ("image", pa.struct([("height", pa.int64()), ("width", pa.int64())])),
        ]
    )


def flat_schema() -> Any:
    """`FLAT_COLUMNS` with their types."""
    pa = _arrow()
    found = [("rank", pa.int64()), ("class_id", pa.int64()), ("class_name", pa.string()), ("score", pa.float64())]
    edges = [(name, pa.float64()) for name in ("x1", "y1", "x2", "y2")]
    return pa.schema([*_about(pa), *found, ("area", pa.int64()), *edges, ("mask", pa.string())])


def _about(pa: Any) -> Sequence[tuple[str, Any]]:
    texts, numbers = pa.string(), pa.int64()
    return [
        *(("file", texts), ("frame", numbers), ("time_s", pa.float64()), ("model", texts), ("version", texts)),
        *(("task", texts), ("height", numbers), ("width", numbers)),
    ]


def _write_parquet(rows: Iterator[dict[str, Any]], schema: Any, path: Path) -> None:
    pa = _arrow()
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def _arrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise ConfigError("Parquet needs pyarrow: pip install 'vision-service[parquet]'") from None
    return pyarrow
