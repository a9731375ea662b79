"""Where bytes come from: http(s), local files, and whatever fsspec reaches (s3, gs, ...), from any offset.

`requests` speaks http because it honours proxies and certificates from the environment; fsspec is imported when an
address asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urlsplit

import requests

from vision_service.errors import WeightsError

CHUNK_BYTES = 64 * 1024

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class Interrupted(Exception):
    """The source failed in a way that may pass: a cut connection, a busy server.

    Attributes:
        wait_s: how long the server asks to be left alone; ``None`` where it does not say.
    """

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        offset: of the first byte in ``chunks``; 0 when the source could not or must not continue where it was asked to.
        total_bytes: length of the whole file; ``None`` when the source does not say.
        validator: tells one state of the file from another (an entity tag or a date); empty when there is none.
        chunks: the bytes from ``offset`` on.
    """

    offset: int
    total_bytes: int | None
    validator: str
    chunks: Iterator[bytes]


def mirrored(url: str, mirror: str, name: str) -> str:
    """Where to fetch from when a mirror is set.

    Only public addresses (http and https) are mirrored. The mirror replaces scheme and host and keeps the path, unless
    it says itself where things go: ``{host}``, ``{path}`` (without its first slash) and ``{file}`` (the name in the
    cache) are replaced.

    Args:
        url: the official source.
        mirror: such as ``https://mirror.example/weights`` or ``file:///mnt/weights/{file}``; empty: there is none.
        name: of the file in the cache.

    Raises:
        WeightsError: the mirror has a placeholder that does not exist.
    """
    parts = _split(url)
    if not mirror or parts.scheme not in {"http", "https"}:
        return url
    if "{" not in mirror:
        mirror = mirror.rstrip("/") + "/{path}"
    query = f"?{parts.query}" if parts.query else ""
    try:
        return mirror.format_map({"host": parts.netloc, "path": parts.path.lstrip("/") + query, "file": name})
    except (KeyError, ValueError, IndexError) as error:
        raise WeightsError(
            f"the setting weights_mirror is {mirror!r}; placeholders are {{host}}, {{path}} and {{file}} ({error!r})"
        ) from None


def is_local(url: str) -> bool:
    """Whether an address is on this machine, so that offline mode may use it."""
    return _split(url).scheme == "file"


@contextmanager
def open_source(url: str, offset: int, validator: str, timeout_s: float) -> Iterator[Source]:
    """Open an address for reading.

    Args:
        url: http, https, file, or a scheme that fsspec knows.
        offset: how many bytes are here already.
        validator: of the state that those came from; empty when it is not known. With one, a file that has changed
            since is read from its beginning.
        timeout_s: how long to wait for a connection and for each next piece.

    Raises:
        Interrupted: try again; also raised by the chunks.
        WeightsError: trying again does not help.
    """
    scheme = _split(url).scheme
    if scheme in {"http", "https"}:
        opened = _open_http(url, offset, validator, timeout_s)
    elif scheme == "file":
        opened = _open_file(url, offset, validator)
    else:
        opened = _open_fsspec(url, scheme, offset, validator)
    with opened as source:
        yield source


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise WeightsError(f"{url!r} is not an address: {error}") from None
    if not parts.scheme:
        raise WeightsError(f"{url!r} is not an address; it begins with https://, file:///, s3:// or gs://")
    return parts


@contextmanager
def _open_http(url: str, offset: int, validator: str, timeout_s: float) -> Iterator[Source]:
    # `identity`: a compressed reply has another length and other offsets than the file.
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout_s) as reply:
            if reply.status_code == 416 and _range(reply)[1] == offset:
                yield Source(offset, offset, validator, iter(()))
            elif reply.status_code == 416 and offset:  # the file there is shorter than what is here: another one
                with _open_http(url, 0, "", timeout_s) as again:
                    yield again
            else:
                _check_status(reply)
                start, total = _range(reply) if reply.status_code == 206 else (0, _length(reply))
                yield Source(start, total, _validator(reply), _http_chunks(reply))
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Interrupted(_reason(error)) from None
    except requests.RequestException as error:
        raise WeightsError(f"cannot fetch {url}: {error}") from None


def _check_status(reply: requests.Response) -> None:
    if reply.status_code in {200, 206}:
        return
    said = f"{reply.status_code} {reply.reason}"
    if reply.status_code in _TRY_AGAIN:
        after = reply.headers.get("Retry-After", "")
        raise Interrupted(f"the server said {said}", float(after) if after.isdecimal() else None)
    raise WeightsError(
        f"cannot fetch {reply.url}: the server said {said}. Check the address; a mirror is set by `weights_mirror`, "
        "and a file put in its place by hand is taken as well"
    )


def _http_chunks(reply: requests.Response) -> Iterator[bytes]:
    try:
        yield from reply.iter_content(CHUNK_BYTES)
    except requests.RequestException as error:
        raise Interrupted(_reason(error)) from None


def _range(reply: requests.Response) -> tuple[int, int | None]:
    """First offset and total length that a reply speaks of (RFC 9110, section 14.4)."""
    found = _RANGE.fullmatch(reply.headers.get("Content-Range", ""))
    if found is None:
        if reply.status_code == 206:
            raise WeightsError(f"cannot fetch {reply.url}: the server sent a part and did not say which")
        return 0, None
    return int(found[1] or 0), None if found[2] == "*" else int(found[2])


def _length(reply: requests.Response) -> int | None:
    length = reply.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _validator(reply: requests.Response) -> str:
    tag = reply.headers.get("ETag", "")
    # If-Range takes no weak tags (RFC 9110, section 13.1.5).
    return tag if tag and not tag.startswith("W/") else reply.headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    inner = error.args[0] if error.args else error
    return str(getattr(inner, "reason", None) or inner or type(error).__name__)


@contextmanager
def _open_file(url: str, offset: int, validator: str) -> Iterator[Source]:
    path = Path(unquote(_split(url).path))
    try:
        with path.open("rb") as file:
            status = path.stat()
            now = f"{status.st_size}-{status.st_mtime_ns}"
            yield _from_stream(file, offset, validator, now, status.st_size)
    except OSError as error:
        if error.filename != str(path):
            raise  # from the place that the bytes go to
        raise WeightsError(f"cannot fetch {url}: {error.strerror}") from None


@contextmanager
def _open_fsspec(url: str, scheme: str, offset: int, validator: str) -> Iterator[Source]:
    try:
        fsspec = import_module("fsspec")
        filesystem, path = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise WeightsError(
            f"cannot fetch {url}: {scheme}:// needs a library that is not installed ({error}); "
            "pip install 'vision-service[remote]' brings those for s3 and gs"
        ) from None
    info = _remote(url, filesystem.info, path)
    now = next((str(info[key]) for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    file = _remote(url, filesystem.open, path, "rb")
    try:
        yield _from_stream(_Remote(url, file), offset, validator, now, info.get("size"))
    finally:
        file.close()


def _from_stream(file: IO[bytes] | _Remote, offset: int, validator: str, now: str, size: int | None) -> Source:
    if offset and (validator not in {"", now} or (size is not None and offset > size)):
        offset = 0
    if offset:
        file.seek(offset)
    return Source(offset, size, now, iter(lambda: file.read(CHUNK_BYTES), b""))


class _Remote:
    """A file of fsspec whose errors are ours."""

    def __init__(self, url: str, file: Any) -> None:
        self._url, self._file = url, file

    def seek(self, offset: int) -> None:
        _remote(self._url, self._file.seek, offset)

    def read(self, size: int) -> bytes:
        return bytes(_remote(self._url, self._file.read, size))


def _remote(url: str, call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise WeightsError(f"cannot fetch {url}: {type(error).__name__}: {error}") from None
    except ImportError as error:
        raise WeightsError(f"cannot fetch {url}: {error}; pip install 'vision-service[remote]'") from None
    except Exception as error:  # each of fsspec's libraries has a tree of its own
        raise Interrupted(f"{type(error).__name__}: {error}") from None
