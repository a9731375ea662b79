"""What a job on Ray writes: Parquet files that any node may write and that a rerun finds.

A part holds the rows of some images: one an image and a model, or one that says why there is none. Its name stands
for what is in it, so a part that is written twice is the same part, and it is there as a whole or not at all. The
folder may be on anything that fsspec knows.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vision_service.jobs.items import Item, Outcome
from vision_service.jobs.outputs.tables import nested_row, nested_schema
from vision_service.jobs.remote import open_store
from vision_service.records import Record

PARTS, RESULTS, FAILURES = "parts", "results.jsonl", "failures.jsonl"


@dataclass(frozen=True, slots=True)
class Written:
    """A part as its writer tells of it.

    Attributes:
        images: in it.
        failed: of those, without all their answers.
        reasons: their failures, as records.
    """

    images: int
    failed: int
    reasons: list[Record]


@dataclass(frozen=True, slots=True)
class _Noted:
    """What a part says about an image."""

    part: str
    size_bytes: int
    stamp: str
    passing: bool
    failed: bool

    def is_stale(self, item: Item, *, retry_failures: bool) -> bool:
        """Whether the image is to be done again."""
        changed = (self.size_bytes, self.stamp) != (item.size_bytes, item.stamp)
        return changed or self.passing or (retry_failures and self.failed)


class Parts:
    """The parts of one job in one folder.

    Args:
        url: the folder: a path, or a URL that fsspec knows.
        identity: stands for all that decides what records say, hex digits; parts of another one are removed.

    Raises:
        ConfigError: there is no such store, or its package is missing.
    """

    def __init__(self, url: str, identity: str) -> None:
        self._url = url.rstrip("/")
        self._prefix = f"part-{identity[:16]}-"
        self._store, folder = open_store(self._url)
        self._folder = folder.rstrip("/")

    def clear(self) -> None:
        """Remove all parts."""
        for part in {known.part for known in self._noted().values()}:
            self._store.rm_file(part)

    def pending(self, items: Sequence[Item], *, retry_failures: bool = False) -> Iterator[Item]:
        """The images that no part has, in their order; a part with an image to be done again is removed as a whole.

        Args:
            items: what the sources list now.
            retry_failures: do images again that failed, too, and not only those that changed or could not be read.
        """
        noted = self._noted()
        stale = {
            known.part
            for item in items
            if (known := noted.get(item.file)) is not None and known.is_stale(item, retry_failures=retry_failures)
        }
        for part in sorted(stale):
            self._store.rm_file(part)
        return (item for item in items if (known := noted.get(item.file)) is None or known.part in stale)

    def write(self, outcomes: list[Outcome]) -> Written:
        """Write a part; on any node, and again to the same effect."""
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.Table.from_pylist([row for outcome in outcomes for row in _rows(outcome)], schema=_schema(pa))
        content = io.BytesIO()
        parquet.write_table(table, content, compression="zstd")
        about = [(outcome.item.file, outcome.item.size_bytes, outcome.item.stamp) for outcome in outcomes]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        self._put(f"{self._folder}/{PARTS}/{self._prefix}{name}.parquet", content.getvalue())
        failed = [outcome for outcome in outcomes if outcome.failures]
        return Written(len(outcomes), len(failed), [row for one in failed for row in one.failure_records()])

    def finish(self, items: Iterable[Item]) -> int:
        """Write ``results.jsonl`` and ``failures.jsonl`` from the parts, as a local job has them.

        Args:
            items: what the sources list, for the order: parts come in the order of their first image.

        Returns:
            How many images failed.
        """
        noted = self._noted()
        order: dict[str, int] = {}
        for item in items:
            if item.file in noted:
                order.setdefault(noted[item.file].part, len(order))
        parts = sorted({known.part for known in noted.values()}, key=lambda part: (order.get(part, len(order)), part))
        for name, wanted in ((RESULTS, True), (FAILURES, False)):
            path = f"{self._folder}/{name}"
            some = False
            with self._store.open(path, "wb") as file:
                for part in parts:
                    lines = [
                        row["json"] for row in self._read(part, ["json", "error"]) if (row["error"] is None) is wanted
                    ]
                    some = some or bool(lines)
                    file.write("".join(line + "\n" for line in lines).encode())
            if not some and not wanted:  # no failures leave no file of them
                self._store.rm_file(path)
        return sum(known.failed for known in noted.values())

    def _noted(self) -> dict[str, _Noted]:
        folder = f"{self._folder}/{PARTS}"
        self._store.invalidate_cache()
        if not self._store.exists(folder):
            self._store.makedirs(folder, exist_ok=True)
            return {}
        noted = {}
        for path in sorted(self._store.ls(folder, detail=False)):
            name = str(path).rpartition("/")[2]
            if not name.startswith(self._prefix) or not name.endswith(".parquet"):
                self._store.rm_file(path)  # of another identity, or of a writer that was killed
                continue
            for row in self._read(path, ["file", "size_bytes", "stamp", "passing", "failed"]):
                noted[row["file"]] = _Noted(
                    str(path), *(row[name] for name in ("size_bytes", "stamp", "passing", "failed"))
                )
        return noted

    def _read(self, path: str, columns: list[str]) -> list[Record]:
        from pyarrow import parquet

        with self._store.open(path, "rb") as file:
            rows: list[Record] = parquet.read_table(file, columns=columns).to_pylist()
        return rows

    def _put(self, path: str, content: bytes) -> None:
        if "file" not in self._store.protocol:
            self._store.pipe_file(path, content)  # object stores show an object when all of it is there
            return
        unfinished = f"{path}.{uuid.uuid4().hex}"
        self._store.pipe_file(unfinished, content)
        self._store.mv(unfinished, path)


def _rows(outcome: Outcome) -> Iterator[Record]:
    about = {
        "size_bytes": outcome.item.size_bytes,
        "stamp": outcome.item.stamp,
        "passing": any(failure.passing for failure in outcome.failures),
        "failed": bool(outcome.failures),
    }
    for record in outcome.records():
        yield {**nested_row(record), **about, "json": json.dumps(record)}
    for record in outcome.failure_records():
        named = {name: record[name] for name in ("file", "model", "error", "status", "message")}
        yield {**named, **about, "json": json.dumps(record)}


def _schema(pa: Any) -> Any:
    texts = [(name, pa.string()) for name in ("error", "status", "message", "stamp", "json")]
    more = [*texts, ("size_bytes", pa.int64()), ("passing", pa.bool_()), ("failed", pa.bool_())]
    return pa.schema([*nested_schema(), *(pa.field(name, kind) for name, kind in more)])
