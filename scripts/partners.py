"""Which objects of two answers are the same, and which of the others the library itself gives now and then.

Suppression and the choice of proposals are decisions at a limit: two boxes that overlap by 0.500000 are one object or
two, as the last bit falls. Our network's input differs from the library's by the rounding of its resize alone, and our
convolutions add in another order, so now and then such a decision falls the other way. An object without a partner
is put down to that only if the library is seen to decide both ways itself, when the same noise is added to its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.functional import pil_to_tensor

from vision_service.config import ModelSpec
from vision_service.imaging.decode import decode_for
from vision_service.imaging.preprocess import content_hw, preprocess
from vision_service.types import Detections

LEAST_IOU, SCORE_OFF = 0.98, 0.01
"""What is asked of a pair of objects."""

RUNS = 16
"""How often the library is asked again about a photo."""

ROUNDING = 1e-5
"""Largest difference of two normalised inputs that is rounding: some tens of float32's last bits of a value near 2, and
less than a thousandth of a grey level. Where the inputs differ by more, nothing is put down to rounding."""

Theirs = dict[str, Tensor]
"""An answer of torchvision's detectors: ``boxes``, ``labels``, ``scores``, with masks also ``masks``."""


def pairs(ours: Detections, theirs: Theirs) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Objects of one class, one to one, that overlap by `LEAST_IOU` and whose scores are within `SCORE_OFF`.

    Returns:
        Index here and there, IoU, difference of the scores.
    """
    overlaps = box_iou(torch.from_numpy(ours.boxes_xyxy), theirs["boxes"]).numpy()
    gaps = np.abs(ours.scores[:, None] - theirs["scores"].numpy())
    alike = (ours.class_ids[:, None] == theirs["labels"].numpy()) & (gaps <= SCORE_OFF) & (overlaps >= LEAST_IOU)
    left = np.where(alike, overlaps, -1.0)
    found = []
    while left.size and left.max() > 0:
        row, column = np.unravel_index(left.argmax(), left.shape)
        found.append((int(row), int(column)))
        left[row], left[:, column] = -1.0, -1.0
    rows, columns = np.array(found, int).reshape(-1, 2).T
    return found, overlaps[rows, columns], gaps[rows, columns]


def as_detections(theirs: Theirs, names: Sequence[str]) -> Detections:
    """The library's answer as one of ours.

    Args:
        theirs: without masks, or they are left out.
        names: of the classes.
    """
    ids = theirs["labels"].numpy()
    return Detections(theirs["boxes"].numpy(), ids, tuple(names[i] for i in ids), theirs["scores"].numpy())


def as_theirs(ours: Detections) -> Theirs:
    """Our answer as the library would give it."""
    fields = {"boxes": ours.boxes_xyxy, "labels": ours.class_ids, "scores": ours.scores}
    return {name: torch.from_numpy(values) for name, values in fields.items()}


def decided_by_rounding(
    ours: Detections,
    theirs: Theirs,
    lone: tuple[Sequence[int], Sequence[int]],
    answers: Iterable[Theirs],
    names: Sequence[str],
) -> tuple[set[int], set[int]]:
    """Which objects without a partner the library itself has in one of its answers and not in another.

    Args:
        ours: our answer.
        theirs: the library's, to its own input.
        lone: indices of the objects that have no partner in the other one's answer, ours and theirs.
        answers: the library's, to inputs that differ from its own by rounding.
        names: of the classes.

    Returns:
        Of ours those that are among what one of ``answers`` has and ``theirs`` has not; so a second box for an object
        that the library reports once is never among them. Of theirs those that one of ``answers`` lacks.
    """
    here, there = set[int](), set[int]()
    plain = as_detections(theirs, names)
    for answer in answers:
        kept, _, _ = pairs(plain, answer)
        there |= set(lone[1]) - {before for before, _ in kept}
        new = sorted(set(range(len(answer["scores"]))) - {after for _, after in kept})
        rows = list(lone[0])
        mine = {key: values[rows] for key, values in as_theirs(ours).items()}
        found, _, _ = pairs(as_detections({key: answer[key][new] for key in mine}, names), mine)
        here |= {rows[index] for _, index in found}
    return here, there


def input_gap(network: Any, spec: ModelSpec, photo: Path) -> float:
    """Largest difference between our network's input and the library's, as both are normalised.

    Args:
        network: the library's, with its transform.
        spec: what ours is served by.
        photo: a file.

    Returns:
        Infinity if the pictures in the inputs are not of one size.
    """
    image, original_hw = decode_for(photo.read_bytes(), spec.preprocess)
    pixels, meta = preprocess(image, spec.preprocess, original_hw)
    height, width = content_hw(meta)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    ours = (torch.from_numpy(pixels[:height, :width]).permute(2, 0, 1).float() - mean) * (1.0 / std)
    images, _ = network.transform([read(photo)])
    if tuple(images.image_sizes[0]) != (height, width):
        return float("inf")
    return float((images.tensors[0, :, :height, :width] - ours).abs().max())


def read(photo: Path) -> Tensor:
    """A photo as the library's detectors take it, float ``[3, H, W]`` in 0..1."""
    with Image.open(photo) as image:
        return pil_to_tensor(image.convert("RGB")) / 255


def perturbed_answers(
    network: Any, image: Tensor, beside: Tensor, largest: float, runs: int = RUNS
) -> Iterator[Theirs]:
    """What the library answers when its own input is off by noise.

    Args:
        network: the library's, in eval mode.
        image: float ``[3, H, W]`` in 0..1.
        beside: another one, which every second run has in its batch.
        largest: of the noise, in units of the normalised input; it is uniform, and seeded by the run.
        runs: how many.
    """
    for run in range(runs):
        noise = torch.Generator().manual_seed(run)

        def disturb(_: Any, __: Any, output: Any, noise: torch.Generator = noise) -> Any:
            images, targets = output
            for picture, (height, width) in zip(images.tensors, images.image_sizes, strict=True):
                inner = picture[:, :height, :width]  # padding stays zero, as it does in both
                inner += largest * (2 * torch.rand(inner.shape, generator=noise) - 1)
            return images, targets

        hook = network.transform.register_forward_hook(disturb)
        try:
            with torch.inference_mode():
                answer = network([image, beside] if run % 2 else [image])[0]
        finally:
            hook.remove()
        yield answer
