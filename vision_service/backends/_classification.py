"""From a network's output to the likeliest classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vision_service.backends._outputs import check_finite
from vision_service.types import Classification, Float32Array, Int64Array, Params


def logits_to_classifications(
    logits: Tensor, params: Sequence[Params], class_names: tuple[str, ...]
) -> list[Classification]:
    """Classifications of a batch, whose probabilities are over all classes, whichever a call keeps.

    Args:
        logits: float ``[N, C]``.
        params: as in `scores_to_classifications`.
        class_names: C names.

    Raises:
        InferenceFailed: a logit is NaN or infinite.
    """
    check_finite(logits)
    return scores_to_classifications(softmax(logits), params, class_names)


def softmax(logits: Tensor) -> Tensor:
    """Probabilities, float32 ``[N, C]``, on the device of the logits, float ``[N, C]``.

    Torch has several threads for more than two rows of a thousand classes. Where those have other work, which is under
    load, waiting for them takes longer than the softmax does in one.
    """
    if logits.device.type != "cpu":
        return logits.float().softmax(dim=1)
    values = logits.float().numpy()
    with np.errstate(over="ignore"):  # the largest less the smallest float is infinite, and its probability 0
        values = np.exp(values - values.max(axis=1, keepdims=True))
    values /= values.sum(axis=1, keepdims=True)
    return torch.from_numpy(values)


def scores_to_classifications(
    probabilities: Tensor, params: Sequence[Params], class_names: tuple[str, ...]
) -> list[Classification]:
    """Classifications of a batch.

    Args:
        probabilities: float32 ``[N, C]``, 0..1 and finite, over all classes, whichever a call keeps.
        params: N; ``top_k``, ``score_threshold`` and ``class_ids`` are used.
        class_names: C names.

    Returns:
        N classifications; of equal scores the lower class id comes first.
    """
    found = []
    for scores, chosen in zip(np.clip(probabilities.cpu().numpy(), 0.0, 1.0), params, strict=True):
        class_ids = _best(scores, chosen)
        names = tuple([class_names[i] for i in class_ids.tolist()])
        found.append(Classification(class_ids, names, scores[class_ids]))
    return found


def _best(scores: Float32Array, params: Params) -> Int64Array:
    """Ids of the classes that a call keeps, the likeliest first."""
    least = np.float32(params.score_threshold)
    if params.class_ids is None and params.top_k < len(scores):
        # Only what reaches the last place has to be put in order.
        least = max(least, np.partition(scores, -params.top_k)[-params.top_k])
    class_ids = (scores >= least).nonzero()[0]
    if params.class_ids is not None:
        class_ids = class_ids[np.isin(class_ids, list(params.class_ids))]
    return class_ids[(-scores[class_ids]).argsort(kind="stable")][: params.top_k]
