"""From probabilities to the likeliest classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vision_service.types import Classification, Params


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
        class_ids = np.argsort(-scores, kind="stable")
        if chosen.class_ids is not None:
            class_ids = class_ids[np.isin(class_ids, list(chosen.class_ids))]
        class_ids = class_ids[scores[class_ids] >= chosen.score_threshold][: chosen.top_k]
        names = tuple(class_names[i] for i in class_ids)
        kept = np.clip(scores[class_ids], 0.0, 1.0).astype(np.float32)
        found.append(Classification(class_ids.astype(np.int64), names, kept))
    return found
