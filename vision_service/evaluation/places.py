"""Finding the parts of a dataset, and saying where they were looked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vision_service.errors import ConfigError


def find_folder(root: Path, names: Sequence[str], what: str) -> Path:
    """The first of some folders that exists.

    Args:
        root: where they are looked for.
        names: of folders, best first.
        what: they hold, for the message.

    Raises:
        ConfigError: there is none; lists the names and what is there instead.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ConfigError(f"{root} has no folder for {what}: looked for {listing(names)}; it has {inside(root)}")


def inside(folder: Path) -> str:
    """A short list of what a folder has, folders first."""
    if not folder.is_dir():
        return "nothing, for it is no folder" if folder.exists() else "nothing, for it does not exist"
    entries = sorted(folder.iterdir(), key=lambda path: (not path.is_dir(), path.name))
    names = [f"{path.name}/" if path.is_dir() else path.name for path in entries]
    return listing(names, most=8) if names else "nothing in it"


def listing(names: Iterable[object], most: int = 20) -> str:
    """Names with commas; the rest as a number."""
    words = [str(name) for name in names]
    if not words:
        return "none"
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def read_text(path: Path, what: str) -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path} is not UTF-8 text") from None
