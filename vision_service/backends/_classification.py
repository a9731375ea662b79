"""From probabilities to the likeliest classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vision_service.types import Classification, Float32Array, Params


def scores_to_classifications(
    probabilities: Tensor, params: Sequence[Params], class_names: tuple[str, ...]
) -> list[Classification]:
    """Classifications of a batch.

    Args:
        probabilities: float ``[N, C]``, 0..1 and finite, over all classes, whichever a call keeps.
        params: N; ``top_k``, ``score_threshold`` and ``class_ids`` are used.
        class_names: C names.

    Returns:
        N classifications; of equal scores the lower class id comes first.
    """
    found = []
    for scores, chosen in zip(probabilities.cpu().numpy(), params, strict=True):
        class_ids = _best(scores, chosen)
        names = tuple(class_names[i] for i in class_ids)
        kept = np.clip(scores[class_ids], 0.0, 1.0).astype(np.float32)
        found.append(Classification(class_ids.astype(np.int64), names, kept))
    return found


def _best(scores: Float32Array, params: Params) -> NDArray[np.int64]:
    """Ids of the classes that a call keeps, the likeliest first."""
    least = np.float32(params.score_threshold)
    if params.class_ids is None and params.top_k < len(scores):
        # Only what reaches the last place has to be put in order.
        least = max(least, np.partition(scores, -params.top_k)[-params.top_k])
    class_ids = np.flatnonzero(scores >= least)
    if params.class_ids is not None:
        class_ids = class_ids[np.isin(class_ids, list(params.class_ids))]
    return class_ids[np.argsort(-scores[class_ids], kind="stable")][: params.top_k]
