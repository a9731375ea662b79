"""What a job has done, in a database beside its results, so that a rerun goes on where the last one stopped.

A chunk of images is committed in this order: their lines are appended to the result files and brought to the disk; then
one transaction notes the images and how long the files are. Whatever comes in between, files are cut to their noted
length when the job goes on, so a line is there exactly when its image is noted.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from vision_service.errors import ConfigError
from vision_service.jobs.items import Item, Outcome

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"
DATABASE = ".job.sqlite"

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS done
    (file TEXT PRIMARY KEY, source TEXT, size INTEGER, stamp TEXT, state TEXT) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS done_source ON done (source);
CREATE TABLE IF NOT EXISTS names (file TEXT PRIMARY KEY, stem TEXT UNIQUE) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lengths (name TEXT PRIMARY KEY, bytes INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS swaps (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TEMP TABLE stale (file TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is.

    Attributes:
        done: images that have their answer.
        failed: images that have a reason instead.
    """

    done: int
    failed: int


class Journal:
    """The journal of one folder. One process at a time has it; use it in a ``with``, from one thread.

    Args:
        folder: where results go.
        identity: stands for all that decides what records say; the journal of another one starts anew.
        restart: start anew whatever it is.

    Raises:
        ConfigError: another process has it, or it is damaged.
    """

    def __init__(self, folder: Path, identity: str, *, restart: bool = False) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._base = sqlite3.connect(folder / DATABASE, timeout=0.0, isolation_level=None)
        try:
            self._open(identity, restart)
        except sqlite3.OperationalError as error:
            self._base.close()
            if "locked" in str(error):
                raise ConfigError(f"another job writes to {folder} now; wait for it or choose another folder") from None
            raise ConfigError(f"{folder / DATABASE}: {error}") from None
        except sqlite3.DatabaseError as error:
            self._base.close()
            raise ConfigError(f"{folder / DATABASE} is damaged ({error}); remove it to start anew") from None
        except BaseException:
            self._base.close()
            raise
        self._files = {name: (folder / name).open("ab") for name in (RESULTS, FAILURES)}

    def compare(self, files: Iterable[Item], *, retry_failures: bool) -> None:
        """Forget what is to be done again: changed files, passing failures, and on demand all failures.

        Args:
            files: what the sources list now.
            retry_failures: try failures again whose file has not changed, too.
        """
        if self._base.execute("SELECT 1 FROM done LIMIT 1").fetchone() is None:
            return
        for item in files:
            self._base.execute(
                "INSERT OR IGNORE INTO stale SELECT file FROM done WHERE source = ? AND "
                "(size <> ? OR stamp <> ? OR state = 'again' OR (? AND state = 'failed'))",
                (item.file, item.size_bytes, item.stamp, retry_failures),
            )
        if self._base.execute("SELECT 1 FROM stale LIMIT 1").fetchone() is not None:
            self._forget_stale()

    def is_wanted(self, item: Item) -> bool:
        """Whether an image is still to be done."""
        return self._base.execute("SELECT 1 FROM done WHERE file = ?", (item.file,)).fetchone() is None

    def stem_of(self, item: Item) -> PurePosixPath:
        """Where files about an image go, without a suffix: the same on every run, and no two images' alike."""
        row = self._base.execute("SELECT stem FROM names WHERE file = ?", (item.file,)).fetchone()
        if row is not None:
            return PurePosixPath(row[0])
        plain = stem = item.name.with_suffix("")
        count = 1
        while not self._base.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (item.file, str(stem))).rowcount:
            count += 1
            stem = plain.with_name(f"{plain.name}-{count}")
        return stem

    def commit(self, outcomes: Sequence[Outcome], results: str, failures: str) -> None:
        """Make a chunk last.

        Args:
            outcomes: of its images.
            results: their lines, each with its end.
            failures: likewise.
        """
        for name, text in ((RESULTS, results), (FAILURES, failures)):
            if text:
                self._files[name].write(text.encode())
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
        with _transaction(self._base):
            self._base.executemany(
                "INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?)",
                [(o.item.file, o.item.source, o.item.size_bytes, o.item.stamp, _state(o)) for o in outcomes],
            )
            self._note_lengths()

    def standing(self) -> Standing:
        """How far the job is."""
        rows = dict(self._base.execute("SELECT state = 'ok', COUNT(*) FROM done GROUP BY 1"))
        return Standing(rows.get(1, 0), rows.get(0, 0))

    def close(self) -> None:
        """Let the folder go. No failures leave no file of them."""
        for file in self._files.values():
            file.close()
        if (self._folder / FAILURES).stat().st_size == 0:
            (self._folder / FAILURES).unlink()
        self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, identity: str, restart: bool) -> None:
        self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._base.execute("PRAGMA synchronous = FULL")
        self._base.executescript(f"BEGIN EXCLUSIVE; {_TABLES} COMMIT;")
        known = self._base.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
        self.started_anew = known is not None and (restart or known[0] != identity)
        if known is None or self.started_anew:
            self._reset(identity)
        self._recover()

    def _reset(self, identity: str) -> None:
        with _transaction(self._base):
            for table in ("done", "names", "lengths", "swaps", "meta"):
                self._base.execute(f"DELETE FROM {table}")  # noqa: S608 - the names are ours
            self._base.execute("INSERT INTO meta VALUES ('identity', ?)", (identity,))

    def _recover(self) -> None:
        """Bring files to what the database says, after whatever happened."""
        for (name,) in self._base.execute("SELECT name FROM swaps").fetchall():
            if _beside(self._folder / name).exists():  # else it has its place already
                _beside(self._folder / name).replace(self._folder / name)
            self._base.execute("DELETE FROM swaps WHERE name = ?", (name,))
        lengths = dict(self._base.execute("SELECT name, bytes FROM lengths"))
        for name in (RESULTS, FAILURES):
            path = self._folder / name
            length = lengths.get(name, 0)
            have = path.stat().st_size if path.exists() else 0
            if have < length:
                raise ConfigError(f"{path} was shortened or removed since the job wrote it; --restart starts anew")
            if have > length:
                os.truncate(path, length)

    def _forget_stale(self) -> None:
        """Take lines of images that are done again out of the files: new files first, then a note, then their names."""
        with _transaction(self._base):
            for name in (RESULTS, FAILURES):
                self._files[name].close()
                self._base.execute("INSERT OR REPLACE INTO lengths VALUES (?, ?)", (name, self._without_stale(name)))
                self._base.execute("INSERT INTO swaps VALUES (?)", (name,))
            self._base.execute("DELETE FROM done WHERE file IN (SELECT file FROM stale)")
        self._base.execute("DELETE FROM stale")
        self._recover()
        self._files = {name: (self._folder / name).open("ab") for name in (RESULTS, FAILURES)}

    def _without_stale(self, name: str) -> int:
        with (self._folder / name).open("rb") as old, _beside(self._folder / name).open("wb") as new:
            for line in old:
                file = json.loads(line)["file"]
                if self._base.execute("SELECT 1 FROM stale WHERE file = ?", (file,)).fetchone() is None:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
            return new.tell()

    def _note_lengths(self) -> None:
        rows = [(name, file.tell()) for name, file in self._files.items()]
        self._base.executemany("INSERT OR REPLACE INTO lengths VALUES (?, ?)", rows)


class _transaction:  # noqa: N801 - reads as the statement it is
    """All or nothing. sqlite3's own context manager begins none."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def __enter__(self) -> None:
        self._base.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._base.execute("COMMIT" if kind is None else "ROLLBACK")


def _state(outcome: Outcome) -> str:
    if not outcome.failures:
        return "ok"
    return "again" if any(failure.passing for failure in outcome.failures) else "failed"


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".new")
