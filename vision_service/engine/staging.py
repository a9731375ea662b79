"""Where a batch is put together for the device: memory that is used again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vision_service.imaging.preprocess import stack
from vision_service.types import InputArray


class Staging:
    """One host's batch buffer. It grows to the largest batch and stays.

    Fresh memory for each batch costs more than the copy into it: the kernel clears it page by page. On a GPU the buffer
    is page-locked, without which a copy to the device is neither quick nor asynchronous.

    Args:
        pinned: page-locked memory.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    def stack(self, inputs: Sequence[InputArray]) -> Tensor:
        """Inputs as one batch; smaller ones are padded right and bottom with black.

        Args:
            inputs: N of ``[h, w, 3]``, all uint8 or all float32.

        Returns:
            ``[N, h, w, 3]`` of the largest height and width and the inputs' type; overwritten by the next call.
        """
        height, width = (max(pixels.shape[axis] for pixels in inputs) for axis in (0, 1))
        count = len(inputs) * height * width * 3
        dtype = torch.uint8 if inputs[0].dtype == np.uint8 else torch.float32  # a model's inputs are all of one
        if self._memory.numel() < count or self._memory.dtype != dtype:
            self._memory = torch.empty(count, dtype=dtype, pin_memory=self._pinned)
        batch = self._memory[:count].view(len(inputs), height, width, 3)
        stack(inputs, batch.numpy())
        return batch
