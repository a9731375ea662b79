"""What a command line names, as a stream of files in a stable order: the order of their paths, part by part.

A source is a file, a folder, a pattern with ``*``, ``?``, ``[...]`` or ``**``, a list of files (``@list.txt``), or a
URL of any of these that fsspec knows (``s3://bucket/folder``). Folders give their images; what is named is taken at
its word, whatever it is called. No more than the names of a folder and of those around it are in memory.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from fsspec.utils import glob_translate

from vision_service.errors import ConfigError
from vision_service.jobs.items import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Item

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_MAGIC = re.compile(r"[*?\[]")


def is_url(named: str) -> bool:
    """Whether fsspec has to open it."""
    return _URL.match(named) is not None


def has_magic(named: str) -> bool:
    """Whether it is a pattern."""
    return _MAGIC.search(named) is not None


def check_sources(named: Sequence[str]) -> None:
    """Refuse what is not there, before any work is done.

    Raises:
        ConfigError: nothing was named, or a file, a folder or a list does not exist.
    """
    if not named:
        raise ConfigError("name files, folders, patterns or a list of files: @list.txt")
    for one in named:
        path = Path(one.removeprefix("@"))
        if not is_url(one) and not path.exists() and (one.startswith("@") or not has_magic(one)):
            raise ConfigError(f"{path} does not exist")


def no_images(named: Sequence[str]) -> ConfigError:
    """What to raise when sources have none."""
    return ConfigError(f"no images in {', '.join(named)}; these count: {' '.join(sorted(IMAGE_SUFFIXES))}")


def list_files(named: Sequence[str]) -> Iterator[Item]:
    """The files that sources mean, each once, in the order of the sources and of the paths within each.

    Args:
        named: see the top of this file.

    Raises:
        ConfigError: see `check_sources`; a URL cannot be listed.
    """
    check_sources(named)
    files = (item for one in named for item in _files_of(one))
    return files if len(named) == 1 and not named[0].startswith("@") else _each_once(files)


def local_item(path: Path, name: PurePosixPath) -> Item:
    """A file on a disk; one that is not there has no size, and fails when it is read."""
    try:
        status = path.stat()
    except OSError:
        return Item(str(path), name)
    return Item(str(path), name, status.st_size, str(status.st_mtime_ns))


def plain_name(text: str) -> PurePosixPath:
    """A relative path that stays below wherever it is put."""
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..")]
    return PurePosixPath(*parts or ["image"])


def matcher(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression for whole paths: ``**`` is any number of folders, ``*`` stays within a name."""
    return re.compile(glob_translate(pattern))


def fixed_prefix(pattern: str) -> str:
    """The folders before the first part that has magic; ``photos`` of ``photos/**/*.jpg``."""
    parts = pattern.split("/")
    first = next(i for i, part in enumerate(parts) if has_magic(part))
    return "/".join(parts[:first])


def depth_of(pattern: str) -> int | None:
    """How many folders below its fixed prefix a pattern reaches; ``None``: any number."""
    rest = pattern.removeprefix(fixed_prefix(pattern)).strip("/").split("/")
    return None if "**" in rest else len(rest) - 1


def _files_of(named: str) -> Iterator[Item]:
    if named.startswith("@"):
        yield from _listed_in(Path(named[1:]))
    elif is_url(named):
        from vision_service.jobs.remote import remote_files

        yield from remote_files(named)
    elif Path(named).is_dir():
        yield from (
            local_item(Path(path), plain_name(os.path.relpath(path, named)))
            for path in _walk(named, None)
            if Path(path).suffix.lower() in IMAGE_SUFFIXES
        )
    elif Path(named).exists() or not has_magic(named):
        yield local_item(Path(named), plain_name(Path(named).name))
    else:
        prefix, wanted = fixed_prefix(named), matcher(named)
        root = prefix or ("/" if named.startswith("/") else ".")
        for path in _walk(root, depth_of(named)):
            if wanted.fullmatch(path if prefix or named.startswith("/") else path.removeprefix("./")):
                yield local_item(Path(path), plain_name(os.path.relpath(path, root)))


def _walk(folder: str, depth: int | None) -> Iterator[str]:
    """The files below a folder. Links to folders are not followed: they may lead in circles."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be listed: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if depth is None or depth > 0:
                yield from _walk(entry.path, None if depth is None else depth - 1)
        elif entry.is_file():
            yield entry.path


def _listed_in(file: Path) -> Iterator[Item]:
    """A path or a URL a line; relative ones from where the command runs, as with ``xargs``. ``#`` starts a comment."""
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                named = line.strip()
                if not named or named.startswith("#"):
                    continue
                if is_url(named):
                    from vision_service.jobs.remote import remote_file

                    yield remote_file(named)
                else:
                    yield local_item(Path(named), plain_name(named))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list {file} cannot be read: {error}") from None


def _each_once(files: Iterator[Item]) -> Iterator[Item]:
    """Sources may overlap. What was seen is in a database that goes to the disk when it grows."""
    seen = sqlite3.connect("", isolation_level=None)  # a nameless file, which nobody else sees
    try:
        seen.execute("PRAGMA journal_mode = OFF")
        seen.execute("CREATE TABLE seen (file TEXT PRIMARY KEY) WITHOUT ROWID")
        for item in files:
            if seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (item.file,)).rowcount:
                yield item
    finally:
        seen.close()


def may_have_video(named: Sequence[str]) -> bool:
    """Whether a source is a video, or may turn out to be one: a list is not read for it."""
    return any(one.startswith("@") or Path(one).suffix.lower() in VIDEO_SUFFIXES for one in named)
