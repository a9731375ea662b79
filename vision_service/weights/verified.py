"""Which files had the right sha256 when it was last looked at, so that a list need not read gigabytes.

A memo for people, never a reason to skip a check: loading compares every time. It holds as long as the file's size and
time of change do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Literal

from vision_service.config import FileSpec

State = Literal["missing", "yes", "not yet", "no hash", "altered"]
"""Of a file: not here; compared and right; here and not compared; nothing to compare with; compared and wrong."""


def note(weights_dir: Path, path: Path, sha256: str) -> None:
    """Remember a file's sha256. A cache that cannot be written forgets it."""
    with contextlib.suppress(OSError):
        status = path.stat()
        memo = _memo(weights_dir, path)
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(
            json.dumps({"path": str(path), "size": status.st_size, "time": status.st_mtime_ns, "sha256": sha256})
        )


def state(weights_dir: Path, file: FileSpec) -> State:
    """What is known of a file without reading it.

    Args:
        weights_dir: where memos lie.
        file: with an absolute path.
    """
    path = Path(file.file)
    try:
        status = path.stat()
    except OSError:
        return "missing"
    if not file.sha256:
        return "no hash"
    try:
        memo = json.loads(_memo(weights_dir, path).read_text())
        fresh = (memo["size"], memo["time"]) == (status.st_size, status.st_mtime_ns)
        found = str(memo["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return "not yet"
    if not fresh:
        return "not yet"
    return "yes" if found.startswith(file.sha256) else "altered"


def _memo(weights_dir: Path, path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    return weights_dir / ".verified" / f"{name}.json"
