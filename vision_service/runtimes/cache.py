"""Compiled networks on disk, so that the second start need not compile again.

An entry is a folder, named by a hash of everything that decides what is in it. It appears whole or not at all (written
aside and renamed), its files are compared by sha256 before they are used, and a damaged one is removed and made anew.
Any number of processes may share the folder. It may be deleted whenever nothing is starting.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_INDEX = "entry.json"
_ASIDE = ".aside-"
_ABANDONED_S = 24 * 3600.0


class CompileCache:
    """Entries below a folder.

    Args:
        folder: where; made on the first store. ``None``: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, *parts: str) -> Path | None:
        """The folder with an entry's files.

        Args:
            parts: everything that decides what is in it.
        """
        if self.folder is None:
            return None
        entry = self._entry(parts)
        try:
            if _is_whole(entry):
                return entry
        except FileNotFoundError:
            if not entry.exists():
                return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.debug("%s: %s", entry, error)
        logger.warning("the compiled network in %s is damaged and is made anew", entry)
        self._remove(entry)
        return None

    def store(self, write: Callable[[Path], None], *parts: str) -> Path | None:
        """Make an entry.

        Args:
            write: puts its files into the empty folder that it is given.
            parts: as for `find`.

        Returns:
            The folder with its files; ``None`` when it could not be written, which is logged.
        """
        if self.folder is None:
            return None
        entry = self._entry(parts)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.folder))
        except OSError as error:
            logger.warning("compiled networks cannot be kept in %s: %s", self.folder, error)
            return None
        try:
            write(aside)
            hashes = {file.name: _sha256(file) for file in sorted(aside.iterdir())}
            (aside / _INDEX).write_text(json.dumps({"files": hashes, "parts": parts}, indent=1))
            aside.rename(entry)  # fails where another process was faster
        except (OSError, RuntimeError) as error:  # the second: OpenVINO's, when the disk is full
            if self.find(*parts) is not None:
                return entry
            logger.warning("compiled networks cannot be kept in %s: %s", self.folder, error)
            return None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return entry

    def _entry(self, parts: tuple[str, ...]) -> Path:
        assert self.folder is not None, "asked by callers"
        return self.folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]

    def _remove(self, entry: Path) -> None:
        """Out of the way first, in one step: another process may be making it anew."""
        assert self.folder is not None, "asked by callers"
        try:
            aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=self.folder))
            entry.rename(aside / "damaged")
        except OSError:  # another process removed it
            return
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what processes that were killed left behind."""
        assert self.folder is not None, "asked by callers"
        for left in self.folder.glob(f"{_ASIDE}*"):
            try:
                abandoned = left.stat().st_mtime < time.time() - _ABANDONED_S
            except FileNotFoundError:  # it has just become an entry
                continue
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)


def copy_into(source: Path, folder: Path) -> None:
    """Copy a folder's files into another."""
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)


def _is_whole(entry: Path) -> bool:
    files = json.loads((entry / _INDEX).read_text())["files"]
    return bool(files) and all(_sha256(entry / name) == expected for name, expected in files.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
