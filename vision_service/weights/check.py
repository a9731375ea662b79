"""Is this the file that is meant? Compared by sha256 before anything parses it.

A hash is known in full, by its first digits where a publisher names no more, or not at all. The last two are enough for
formats that cannot run code: safetensors, torch's own format read with ``weights_only=True``, Darknet ``.weights`` and
ONNX. They are not enough for pickles; `check_trusted` says so.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path

from vision_service.config import FileSpec, WeightsSpec
from vision_service.errors import WeightsError

logger = logging.getLogger(__name__)

FULL = 64
"""Hex digits of a sha256."""


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, lower-case hex; read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checked(where: str, file: FileSpec, source: str = "") -> bytes:
    """A file's bytes, once they are known to be the right ones; read once, so that they stay so.

    A file without a hash is read as well, and the log says once that it was not verified: only for formats that cannot
    run code.

    Args:
        where: begins the messages.
        file: whose path to read and whose sha256 to compare with.
        source: where the file came from, for people.

    Raises:
        WeightsError: it cannot be read, or is another file.
    """
    path = Path(file.file)
    try:
        data = path.read_bytes()
    except OSError as error:
        came_from = f"; it came from: {source}" if source else ""
        raise WeightsError(f"{where}: cannot be read ({error.strerror}){came_from}") from None
    if not file.sha256:
        _say_unverified(path)
        return data
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(file.sha256):
        raise WeightsError(_altered(where, found, file.sha256, source))
    return data


def check_trusted(path: Path, weights: WeightsSpec, trusted: bool) -> None:
    """Refuse a file that can run code when it is loaded, unless it is known or the user trusts it.

    To be called just before such a file is parsed. The parser opens the file again: whoever may write to the cache
    between the two can run code, as whoever may write to the program can.

    Args:
        path: the file.
        weights: what is known of it; only a full sha256 counts.
        trusted: whether the user said so (``ModelSpec.trusted``). A hash that is known must match all the same.

    Raises:
        WeightsError: it cannot be read, is another file, or is neither known in full nor trusted.
    """
    where = f"weights {path}"
    if len(weights.sha256) < FULL and not trusted:
        known = f"only the first {len(weights.sha256)} digits of its sha256 are" if weights.sha256 else "no sha256 is"
        raise WeightsError(
            f"{where}: this format is a pickle, which can run any code on this machine while it is loaded, and {known} "
            "known for it. Load it if you trust where it came from: `serve --trust NAME`, the setting trusted_models, "
            "or `vision-service models add --trust`, which notes its sha256 so that only this very file loads"
        )
    if not weights.sha256:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise WeightsError(f"{where}: cannot be read ({error.strerror}); it came from: {weights.source}") from None
    if not found.startswith(weights.sha256):
        raise WeightsError(_altered(where, found, weights.sha256, weights.source))


def _altered(where: str, found: str, expected: str, source: str) -> str:
    again = f"Fetch it again ({source})" if source else "Fetch it again"
    return (
        f"{where}: its sha256 is {found}, the manifest expects {expected}: the file was altered or is another one. "
        f"{again}, or correct the manifest if the change was meant"
    )


@functools.cache
def _say_unverified(path: Path) -> None:
    logger.warning("%s is unverified: its publisher names no sha256, so any file of that name would be taken", path)
