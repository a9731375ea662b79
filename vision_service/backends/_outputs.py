"""What every reader of a network's output checks first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vision_service.errors import InferenceFailed


def check_finite(*outputs: Tensor) -> None:
    """Refuse NaN and infinity, which would pass through thresholds as "nothing found".

    Args:
        outputs: float tensors, the batch first, on one device. Looking at them costs one synchronisation with it.

    Raises:
        InferenceFailed: names the images of the batch that are affected.
    """
    if outputs[0].device.type == "cpu" and all(_sum_is_finite(output) for output in outputs):
        return
    finite = torch.stack([torch.isfinite(output).flatten(1).all(dim=1) for output in outputs]).all(dim=0)  # [N]
    bad = [index for index, ok in enumerate(finite.tolist()) if not ok]
    if bad:
        raise InferenceFailed(
            f"the network returned NaN or infinity for image {', '.join(map(str, bad))} of a batch of {len(finite)}"
        )


def _sum_is_finite(output: Tensor) -> bool:
    """Whether nothing is wrong for sure: NaN and infinity survive a sum, which costs a hundredth of looking at each."""
    return math.isfinite(float(output.sum(dtype=torch.float32)))
