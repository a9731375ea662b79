"""A class map as one mask a class: how replies and result files list it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vision_service.types import VOID, SegmentationMap


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The pixels of one class.

    Attributes:
        class_id: index in the model's class table.
        class_name: name there.
        area: how many pixels.
        box_xyxy: the smallest box around them: pixel edges, so x2 and y2 lie past the last column and row.
        mask: bool ``[H, W]``.
    """

    class_id: int
    class_name: str
    area: int
    box_xyxy: tuple[int, int, int, int]
    mask: NDArray[np.bool_]


def segments_of(found: SegmentationMap) -> Iterator[Segment]:
    """One segment a class that has pixels, largest area first; neither background nor void is among them."""
    areas = found.areas()
    for class_id in np.argsort(-areas, kind="stable").tolist():
        if not areas[class_id]:
            return
        if class_id not in (VOID, found.background_id):
            mask = found.mask(class_id)
            yield Segment(class_id, found.class_names[class_id], int(areas[class_id]), _bounds(mask), mask)


def _bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
