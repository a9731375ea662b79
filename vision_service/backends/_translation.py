"""From a network's image to the original's size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vision_service.backends._outputs import check_finite
from vision_service.imaging.preprocess import plane_to_original
from vision_service.types import ImageMeta, TranslatedImage


def planes_to_images(images: Tensor, metas: Sequence[ImageMeta]) -> list[TranslatedImage]:
    """Images of the originals' sizes, or of as many times them as the network enlarges its input.

    Padding is cut off, and a stretched or shrunk image goes back to the original's size and shape. Where the network
    never saw the original (outside a centre crop) the result is black.

    Args:
        images: ``[N, 3, h', w']`` RGB in units of 0..255; what lies outside is clipped.
        metas: N, how to go back from the network's input, whose size may be another.

    Returns:
        N images, uint8.

    Raises:
        InferenceFailed: a value is NaN or infinite.
    """
    check_finite(images)
    pixels = images.float().clamp(0.0, 255.0).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # [N, h', w', 3]
    found = []
    for image, meta in zip(pixels, metas, strict=True):
        back = plane_to_original(image, _enlarged(meta, (image.shape[0], image.shape[1])))
        found.append(TranslatedImage(back.round().clip(0, 255).astype(np.uint8)))
    return found


def _enlarged(meta: ImageMeta, output_hw: tuple[int, int]) -> ImageMeta:
    """How to go back from an output that is so many times the input, to as many times the original."""
    factor_hw = [size / before for size, before in zip(output_hw, meta.input_hw, strict=True)]
    original_hw = [max(1, round(size * factor)) for size, factor in zip(meta.original_hw, factor_hw, strict=True)]
    scale_hw = [
        meta.scale_xy[1 - axis] * factor_hw[axis] * meta.original_hw[axis] / original_hw[axis] for axis in (0, 1)
    ]
    return ImageMeta(
        (original_hw[0], original_hw[1]),
        output_hw,
        (scale_hw[1], scale_hw[0]),
        (meta.offset_xy[0] * factor_hw[1], meta.offset_xy[1] * factor_hw[0]),
    )
