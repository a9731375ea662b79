"""Backend ``pix2pix``: an image for an image, by the generator of pix2pix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from vision_service.backends._input_size import check_input_multiple
from vision_service.backends._options import read_options
from vision_service.backends._translation import planes_to_images
from vision_service.backends.base import Backend
from vision_service.config import ModelSpec
from vision_service.errors import ConfigError
from vision_service.networks.pix2pix import Generator
from vision_service.types import ImageMeta, Params, Prediction, Task


class Pix2PixBackend(Backend):
    """Builds pix2pix's `Generator`; the answer has the size of the image that was sent.

    Mean and std of 127.5 give the -1..1 that it was trained on. ``stretch`` to 256 x 256 is what the published ones
    were made for, and the answer is stretched back; ``native`` with a ``pad_multiple`` of 256 translates in full
    resolution, and the padding is cut off.

    The paper keeps dropout at inference, for variety. Here the same image gives the same answer: there is none.

    Options:
        width: channels of the outermost level (64).
        levels: how often the size is halved (8).
        statistics: of the norms. ``running``: those kept from training. ``image``: each image's own, which is how the
            paper and its released code run generators that were trained with batches of one.
    """

    task: ClassVar[Task] = Task.TRANSLATE

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        options = read_options(spec, {"width": 64, "levels": 8, "statistics": "running"})
        self._width, self._levels, self._statistics = options["width"], options["levels"], options["statistics"]
        where = f"model {spec.name!r}: option"
        if self._width < 1 or self._levels < 5:
            raise ConfigError(f"{where} 'width' must be 1 or more and 'levels' 5 or more, got {spec.options}")
        if self._statistics not in ("running", "image"):
            raise ConfigError(f"{where} 'statistics' must be 'running' or 'image', got {self._statistics!r}")
        check_input_multiple(spec, 2**self._levels, f"pix2pix with {self._levels} levels")

    def build_network(self) -> nn.Module:
        """`Generator`: RGB ``[N, 3, h, w]`` in -1..1."""
        return Generator(self._width, self._levels, per_image=self._statistics == "image")

    def postprocess(
        self, outputs: tuple[Tensor, ...], metas: Sequence[ImageMeta], params: Sequence[Params]
    ) -> list[Prediction]:
        """Images of the originals' sizes. No parameter applies."""
        (images,) = outputs
        return list(planes_to_images((images.float() + 1.0) * 127.5, metas))
