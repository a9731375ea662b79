"""Sizes of input that a network cannot take, refused before it is asked."""

from __future__ import annotations

from vision_service.config import Limit, ModelSpec, Native, ShortestSideCrop
from vision_service.errors import ConfigError


def check_input_multiple(spec: ModelSpec, multiple: int, network: str) -> None:
    """Refuse preprocessing whose sizes a network's stages cannot halve evenly.

    Args:
        spec: whose preprocessing to look at.
        multiple: both sides of the input must be a multiple of it, pixels.
        network: what to call the network in the message.

    Raises:
        ConfigError: names the field and the sizes that would do.
    """
    resize = spec.preprocess.resize
    where = f"model {spec.name!r}: {network} takes sides that are multiples of {multiple}"
    if isinstance(resize, Native | Limit):
        if resize.pad_multiple % multiple:
            raise ConfigError(
                f"{where}, but preprocess.resize.pad_multiple is {resize.pad_multiple}: set it to {multiple}"
            )
        return
    field, size_hw = (
        ("crop_hw", resize.crop_hw) if isinstance(resize, ShortestSideCrop) else ("size_hw", resize.size_hw)
    )
    if any(side % multiple for side in size_hw):
        height, width = (max(multiple, round(side / multiple) * multiple) for side in size_hw)
        raise ConfigError(
            f"{where}, but preprocess.resize.{field} is {list(size_hw)}: use [{height}, {width}] or another multiple"
        )
