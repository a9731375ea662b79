"""Content of files. Whoever only reads and decodes, such as a task on a cluster, imports no more than this."""

from __future__ import annotations

from pathlib import Path

from vision_service.errors import InvalidImage
from vision_service.imaging.decode import DecodeLimits
from vision_service.jobs.items import Item
from vision_service.jobs.sources import is_url


def read_item(item: Item, limits: DecodeLimits) -> bytes:
    """Content of an image's file.

    Raises:
        InvalidImage: the file is larger than the limits allow.
        OSError: it cannot be read.
    """
    if item.size_bytes > limits.max_bytes:
        raise InvalidImage(f"{item.file} has {item.size_bytes} bytes, the limit is {limits.max_bytes}")
    if is_url(item.file):
        from vision_service.jobs.remote import read_url

        return read_url(item.file)
    return Path(item.file).read_bytes()
