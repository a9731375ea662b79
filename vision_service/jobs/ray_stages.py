"""What tasks on a cluster do around the models. A worker that runs them imports this, and no torch."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from vision_service.config import PreprocessSpec
from vision_service.errors import VisionError
from vision_service.imaging.decode import DecodeLimits, decode_for, decode_image
from vision_service.jobs.items import Failure, Item, Outcome
from vision_service.jobs.ray_parts import Parts
from vision_service.jobs.reading import read_item

COLUMN = "pickled"
"""The one column of every block: an item, an outcome or a part. Images of many sizes fit no other type."""


class Decode:
    """Reads and decodes the images of a block.

    What leaves it is an item with pixels; or an outcome, of what could not be read; or an item and the content of its
    file, of a JPEG so large that the only model decodes it at a fraction of its size.

    Args:
        limits: of images.
        only: how the one model prepares images; ``None``: there are several, which share the whole picture.
        folder: what relative paths are meant from.
    """

    def __init__(self, limits: DecodeLimits, only: PreprocessSpec | None, folder: str) -> None:
        self._limits = limits
        self._only = only
        self._folder = folder

    def __call__(self, batch: Any) -> Iterator[Any]:
        """A block of items; a block each."""
        stand_in(self._folder)
        for item in unpack(batch):
            yield pack([self._decoded(item)])  # one by one: a few large images fill a block

    def _decoded(self, item: Item) -> Item | Outcome | tuple[Item, bytes]:
        try:
            content = read_item(item, self._limits)
            if self._only is None:
                return replace(item, pixels=decode_image(content, self._limits))
            pixels, whole_hw = decode_for(content, self._only, self._limits)
            return replace(item, pixels=pixels) if pixels.shape[:2] == whole_hw else (item, content)
        except OSError as error:
            return Outcome(item, failures=(Failure.unreadable(item.file, error),))
        except VisionError as error:
            return Outcome(item, failures=(Failure(error),))


class Write:
    """Writes a part."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def __call__(self, batch: Any) -> Any:
        """A block of outcomes; what was written."""
        return pack([self._parts.write(list(unpack(batch)))])


def pack(values: Iterable[Any]) -> Any:
    """Values as a block of Ray's."""
    import pyarrow

    pickled = [pickle.dumps(value, protocol=5) for value in values]
    return pyarrow.table({COLUMN: pyarrow.array(pickled, type=pyarrow.large_binary())})


def unpack(batch: Any) -> Iterator[Any]:
    """What `pack` put in. It comes from tasks of this program, as every value that Ray passes on."""
    return (pickle.loads(value.as_buffer()) for value in batch.column(COLUMN))  # noqa: S301


def stand_in(folder: str) -> None:
    """Make relative paths mean what they mean where the program was started, on a node that has that folder."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
