"""Files behind URLs, listed and read by fsspec. What each kind of store needs comes with the extra ``remote``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec

from vision_service.errors import ConfigError
from vision_service.jobs.items import IMAGE_SUFFIXES, Item
from vision_service.jobs.sources import depth_of, fixed_prefix, has_magic, matcher, plain_name

_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
"""What stores call the thing that changes with the content, the surest first."""


def remote_files(url: str) -> Iterator[Item]:
    """The files that a URL means: a file, a folder's images, or a pattern.

    Raises:
        ConfigError: the store is unknown, its package is missing, it is not there, or the folder cannot be listed.
    """
    store, path = open_store(url)
    if has_magic(path):
        prefix = fixed_prefix(path)
        wanted = matcher(path)
        for found in _walk(store, prefix, depth_of(path), url):
            if wanted.fullmatch(_plain(found["name"])):
                yield _item(store, found, _below(found["name"], prefix))
        return
    # A web server has no folders but pages that list some, which a path that ends in a slash may be.
    is_folder = url.endswith("/") if _is_web(store) else _safely(url, store.isdir, path)
    if not is_folder:
        yield remote_file(url)
        return
    for found in _walk(store, path, None, url):
        if PurePosixPath(found["name"]).suffix.lower() in IMAGE_SUFFIXES:
            yield _item(store, found, _below(found["name"], path))


def remote_file(url: str) -> Item:
    """One file; one that is not there has no size, and fails when it is read."""
    store, path = open_store(url)
    name = plain_name(PurePosixPath(path).name)
    try:
        return _item(store, store.info(path), name)
    except Exception:  # each store has errors of its own; reading will say what is wrong
        return Item(url, name)


def read_url(url: str) -> bytes:
    """Content of a file.

    Raises:
        OSError: it cannot be read.
    """
    store, path = open_store(url)
    try:
        content: bytes = store.cat_file(path)
    except OSError:
        raise
    except Exception as error:  # each store has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error
    return content


def open_store(url: str) -> tuple[Any, str]:
    """The store of a URL or a path, by fsspec, and the place in it.

    Raises:
        ConfigError: there is no such store, or its package is missing.
    """
    try:
        store, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url} cannot be opened: {error}; pip install 'vision-service[remote]'") from None
    return store, str(path)


def _safely(url: str, ask: Any, path: str) -> Any:
    try:
        return ask(path)
    except Exception as error:
        raise ConfigError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error


def _walk(store: Any, folder: str, depth: int | None, url: str) -> Iterator[dict[str, Any]]:
    found = _safely(url, lambda path: store.ls(path, detail=True), folder)
    for entry in sorted(found, key=lambda entry: str(entry["name"])):
        if _plain(entry["name"]) == _plain(folder) or not _plain(entry["name"]).startswith(_plain(folder)):
            continue  # stores list a folder's own marker, pages link to elsewhere
        if entry["type"] == "directory":
            if depth is None or depth > 0:
                yield from _walk(store, entry["name"], None if depth is None else depth - 1, url)
        else:
            yield entry


def _item(store: Any, info: dict[str, Any], name: PurePosixPath) -> Item:
    size = info.get("size")
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    return Item(store.unstrip_protocol(info["name"]), name, -1 if size is None else int(size), stamp)


def _below(path: str, folder: str) -> PurePosixPath:
    return plain_name(_plain(path).removeprefix(_plain(folder)))


def _plain(path: str) -> str:
    return str(path).rstrip("/")


def _is_web(store: Any) -> bool:
    return "http" in ((store.protocol,) if isinstance(store.protocol, str) else store.protocol)
