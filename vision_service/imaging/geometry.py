"""Where an image goes in a network's input: the arithmetic of the resize modes, in whole pixels.

Every mode is the same three steps: cut a window out of the original, resize it, place it in the input (what sticks
out is cropped, what is missing is filled). The plans follow the libraries that trained the weights, so that a network
sees what it saw in training:

    shortest_side_crop  torchvision ``transforms``: Resize(int) + CenterCrop, its rounding and its zero padding
    letterbox           Ultralytics ``LetterBox``: sides rounded half to even, the odd pixel of padding right or below
    limit               torchvision ``models.detection.transform.GeneralizedRCNNTransform``: sides rounded down

A side never becomes less than one pixel, where those libraries would fail. The scale in the meta is the one that the
rounded size really has, per axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vision_service.config import Letterbox, Limit, Native, ShortestSideCrop, Stretch
from vision_service.types import ImageMeta

Size = tuple[int, int]
Resize = ShortestSideCrop | Letterbox | Stretch | Limit | Native

_LARGEST_WHOLE_ASPECT = 32
"""Images longer than this are cut before they are resized: a 1 x 50000 strip resized whole would fill the memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with an image, all in whole pixels.

    Attributes:
        window_yx: where the window starts in the original.
        window_hw: its size.
        resized_hw: what the window is resized to.
        offset_yx: where the resized window lies in the input; negative: that much is cropped away.
        input_hw: size of the input.
        fill: RGB around the window, or ``None`` to repeat its edge.
    """

    window_yx: Size
    window_hw: Size
    resized_hw: Size
    offset_yx: Size
    input_hw: Size
    fill: tuple[int, int, int] | None = (0, 0, 0)

    def meta(self, original_hw: Size) -> ImageMeta:
        """How to go back to an original of this height and width."""
        scale_y, scale_x = (self.resized_hw[axis] / self.window_hw[axis] for axis in (0, 1))
        offset_y = self.offset_yx[0] - self.window_yx[0] * scale_y
        offset_x = self.offset_yx[1] - self.window_yx[1] * scale_x
        return ImageMeta(original_hw, self.input_hw, (scale_x, scale_y), (offset_x, offset_y))


def plan(resize: Resize, height: int, width: int) -> Plan:
    """What to do with an image of this size.

    Args:
        resize: the geometry.
        height: of the original, pixels.
        width: of the original, pixels.

    Returns:
        Window, size and place, in whole pixels.
    """
    match resize:
        case ShortestSideCrop():
            return _plan_shortest_side_crop(resize, height, width)
        case Letterbox():
            return _plan_letterbox(resize, height, width)
        case Stretch():
            return Plan((0, 0), (height, width), resize.size_hw, (0, 0), resize.size_hw)
        case Limit():
            ratio = min(resize.shortest_side / min(height, width), resize.longest_side / max(height, width))
            resized = (max(1, math.floor(height * ratio)), max(1, math.floor(width * ratio)))
            padded = _round_up(resized, resize.pad_multiple)
            return Plan((0, 0), (height, width), resized, (0, 0), padded)
        case Native():
            padded = _round_up((height, width), resize.pad_multiple)
            return Plan((0, 0), (height, width), (height, width), (0, 0), padded, None)


def _round_up(size_hw: Size, multiple: int) -> Size:
    return -(-size_hw[0] // multiple) * multiple, -(-size_hw[1] // multiple) * multiple


def _plan_letterbox(resize: Letterbox, height: int, width: int) -> Plan:
    ratio = min(resize.size_hw[0] / height, resize.size_hw[1] / width)
    if not resize.upscale:
        ratio = min(ratio, 1.0)
    resized = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    padding = [whole - side for whole, side in zip(resize.size_hw, resized, strict=True)]
    if resize.pad_multiple is not None:
        padding = [pad % resize.pad_multiple for pad in padding]
    offset = (padding[0] // 2, padding[1] // 2) if resize.align == "center" else (0, 0)
    input_hw = (resized[0] + padding[0], resized[1] + padding[1])
    return Plan((0, 0), (height, width), resized, offset, input_hw, resize.fill)


def _plan_shortest_side_crop(resize: ShortestSideCrop, height: int, width: int) -> Plan:
    short, long = min(height, width), max(height, width)
    new_short, new_long = resize.shortest_side, int(resize.shortest_side * long / short)
    axis = 0 if height > width else 1  # the long one
    crop = resize.crop_hw[axis]
    start, offset = 0, _center_offset(new_long, crop)
    if long > _LARGEST_WHOLE_ASPECT * short and crop < new_long:
        # Whole pixels around what survives the crop; the meta keeps the fraction by which this shifts the picture.
        scale = new_long / long
        margin = 2 + math.ceil(2 / scale)
        start = max(0, math.floor(-offset / scale) - margin)
        stop = min(long, math.ceil((crop - offset) / scale) + margin)
        center = (crop / 2 - offset) / scale
        long, new_long = stop - start, max(crop, round((stop - start) * scale))
        offset = -min(max(0, round((center - start) * new_long / long - crop / 2)), new_long - crop)
    offset_short = _center_offset(new_short, resize.crop_hw[1 - axis])
    if axis == 0:
        return Plan((start, 0), (long, short), (new_long, new_short), (offset, offset_short), resize.crop_hw)
    return Plan((0, start), (short, long), (new_short, new_long), (offset_short, offset), resize.crop_hw)


def _center_offset(size: int, crop: int) -> int:
    """Where a centred side lies in its crop, rounded as torchvision's ``center_crop`` does."""
    return (crop - size) // 2 if crop > size else -round((size - crop) / 2.0)


OVERSAMPLING = 3.0
"""How many times as large as its place in the input a picture must stay when a JPEG is decoded at a smaller scale."""

REDUCTIONS = (8, 4, 2)
"""What decoders can divide the sides of a JPEG by at no cost: they leave high frequencies of its 8 x 8 blocks out."""


def reduction(resize: Resize, height: int, width: int) -> int:
    """By how much a picture's sides may be divided before it is resized, without that being seen in the input.

    Args:
        resize: the geometry.
        height: of the picture as stored; EXIF orientation may exchange the two.
        width: likewise.

    Returns:
        8, 4, 2, or 1: not at all.
    """
    for factor in REDUCTIONS:
        if all(_stays_large(plan(resize, *size_hw), size_hw, factor) for size_hw in ((height, width), (width, height))):
            return factor
    return 1


def _stays_large(planned: Plan, size_hw: Size, factor: int) -> bool:
    # A rest would be rounded up and shift the picture. What is cut out of a very long one is cut in its own pixels.
    exact = planned.window_hw == size_hw and all(side % factor == 0 for side in size_hw)
    return exact and all(
        side >= OVERSAMPLING * factor * resized for side, resized in zip(size_hw, planned.resized_hw, strict=True)
    )
