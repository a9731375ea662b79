"""Backend ``esrgan_slim``: images of twice the size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._options import read_options
from vision_service.backends._outputs import check_finite
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.networks.esrgan_slim import EsrganSlim
from vision_service.types import ImageMeta, Params, Prediction, Task, TranslatedImage, UInt8Array


class EsrganSlimBackend(Backend):
    """Builds `EsrganSlim` and turns its output into an image.

    Options: ``features`` (channels of the trunk, 64), ``growth`` (4), ``blocks`` (2).
    """

    task: ClassVar[Task] = Task.TRANSLATE

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._options = read_options(spec, {"features": 64, "growth": 4, "blocks": 2})

    def build_network(self) -> nn.Module:
        """`EsrganSlim`: RGB ``[N, 3, 2 h, 2 w]``, about 0..1."""
        return EsrganSlim(**self._options)

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Images of the originals' size times two, the padding cut off. No parameter applies."""
        (images,) = outputs
        check_finite(images)
        # Rounded on the device: a quarter of the bytes cross the bus.
        pixels = (images.float() * 255.0).round_().clamp_(0.0, 255.0).byte().permute(0, 2, 3, 1).contiguous()
        return [TranslatedImage(_crop(image, meta)) for image, meta in zip(pixels.cpu().numpy(), metas, strict=True)]


def _crop(image: UInt8Array, meta: ImageMeta) -> UInt8Array:
    """The part of the output that shows the original: uint8 ``[H', W', 3]``."""
    slices = []
    for axis in (0, 1):
        factor = image.shape[axis] / meta.input_hw[axis]
        start = meta.offset_xy[1 - axis]
        stop = start + meta.original_hw[axis] * meta.scale_xy[1 - axis]
        slices.append(slice(max(0, round(start * factor)), round(stop * factor)))
    return image[slices[0], slices[1]]
