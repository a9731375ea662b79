"""From logits a pixel to a class map of the original: resize the probabilities first, then decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vision_service.backends._outputs import check_finite
from vision_service.config import ModelSpec
from vision_service.errors import InferenceFailed
from vision_service.imaging.preprocess import class_map_to_original, plane_to_original
from vision_service.types import VOID, Float32Array, ImageMeta, Params, SegmentationMap, UInt8Array


def foreground_id(class_count: int, background_id: int | None) -> int:
    """The class that the single channel of a binary network means.

    Args:
        class_count: one class, or two of which one is the background.
        background_id: that one, or ``None``.

    Raises:
        ValueError: the classes leave none, or more than one, for the channel.
    """
    others = [class_id for class_id in range(class_count) if class_id != background_id]
    if len(others) != 1:
        raise ValueError(
            f"a network with one output channel needs one class beside the background, got {class_count} classes "
            f"with background_id {background_id}"
        )
    return others[0]


def logits_to_maps(
    logits: Tensor, metas: Sequence[ImageMeta], params: Sequence[Params], spec: ModelSpec
) -> list[SegmentationMap]:
    """Class maps of a batch.

    One channel is a binary network: sigmoid, foreground where the probability reaches the threshold. As many channels
    as classes: softmax, the likeliest class, and nothing where even that one stays below the threshold. What is
    neither, and classes that the call filters out, become the background class, or `VOID` without one.

    Args:
        logits: ``[N, 1, h, w]`` or ``[N, C, h, w]``, of the input's size.
        metas: N, how to go back.
        params: N; ``score_threshold`` and ``class_ids`` are used.
        spec: classes and background.

    Returns:
        N class maps of the originals' sizes.

    Raises:
        InferenceFailed: a logit is NaN or infinite, or the channels do not fit the classes.
    """
    channels, classes = logits.shape[1], len(spec.classes)
    if channels not in (1, classes):
        raise InferenceFailed(f"the network returned {channels} channels for {classes} classes")
    check_finite(logits)
    probabilities = (logits.float().sigmoid() if channels == 1 else logits.float().softmax(dim=1)).cpu().numpy()
    ids = [foreground_id(classes, spec.background_id)] if channels == 1 else list(range(classes))
    nothing = VOID if spec.background_id is None else spec.background_id
    maps = []
    for planes, meta, chosen in zip(probabilities, metas, params, strict=True):
        best, class_map = _best_class(planes, ids, meta)
        dropped = best < chosen.score_threshold
        if chosen.class_ids is not None:
            dropped |= ~np.isin(class_map, list(chosen.class_ids))
        # Where the network never saw the original (outside a centre crop) there is no class, even at threshold 0.
        unseen = class_map_to_original(np.zeros(meta.input_hw, np.uint8), meta, unseen=1).astype(bool)
        class_map[dropped | unseen] = nothing
        maps.append(SegmentationMap(class_map, spec.classes, spec.background_id))
    return maps


def _best_class(planes: Float32Array, ids: Sequence[int], meta: ImageMeta) -> tuple[Float32Array, UInt8Array]:
    """Highest probability and its class for each pixel of the original.

    Class by class, for all of them at the original's size may not fit into memory: 21 float32 planes of a 12 megapixel
    photo are a gigabyte.
    """
    best = plane_to_original(planes[0], meta)  # [H, W]
    class_map = np.full(best.shape, ids[0], np.uint8)
    for class_id, plane in zip(ids[1:], planes[1:], strict=True):
        probability = plane_to_original(plane, meta)
        better = probability > best
        best[better] = probability[better]
        class_map[better] = class_id
    return best, class_map
