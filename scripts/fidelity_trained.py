"""Torchvision's detectors and a segmenter with weights that mean something, from the same JPEG: ours and the library's.

`train_fidelity.py` makes the weights. Alone, for networks whose weights are there:

    python scripts/fidelity_trained.py [NAME...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from fidelity_darknet import above
from fidelity_page import Page, Run, Section
from partners import (
    ROUNDING,
    RUNS,
    Theirs,
    as_detections,
    decided_by_rounding,
    input_gap,
    pairs,
    perturbed_answers,
    read,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from train_fidelity import cells, membranes
from trained import CELLS, RECIPES, ROOT, library, served, weights_file

from vision_service.config import ModelSpec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, replace_fields
from vision_service.evaluation.detection import score_detections
from vision_service.evaluation.voc import AnnotatedBoxes, read_voc_annotation
from vision_service.imaging.masks import decode_rle
from vision_service.types import Detections, ParamOverrides, Result, Task

REPORTED = 0.25
"""Objects are compared from this score on: the default of what is served."""
LOWEST = 0.01
"""Scores from here on count for the mean average precision."""
EQUAL_PIXELS, MAP_OFF = 0.995, 0.003
SHORT_PHOTOS = 24

RUNTIMES = {"ssdlite320_mobilenet_v3_large": ("torch", "onnxruntime", "openvino")}
"""Of the detectors, those that other runtimes can take; torch alone for the rest, see docs/runtimes.md."""


def compare(page: Page, run: Run, names: Sequence[str] = tuple(RECIPES)) -> None:
    """A table of detectors and one of segmenters, of networks whose weights are there."""
    there = [name for name in names if weights_file(name).exists()]
    for name in set(names) - set(there):
        print(f"left out: {name}, `make train-fidelity` trains it", flush=True)
    photos = cells(run.shared / "data", "test")[: SHORT_PHOTOS if run.short else None]
    page.table(
        f"Torchvision, trained, from the same JPEG ({len(photos)} photos of BCCD's test split)",
        f"objects from {REPORTED}, ours / theirs",
        "matched",
        "decided by rounding",
        "least IoU",
        "score off",
        "mAP at IoU 0.5, ours / theirs",
        "mask pixels equal",
    )
    specs = {name: served(name) for name in there}
    for name in (name for name in there if specs[name].task is Task.DETECT):
        for runtime in RUNTIMES.get(name, ("torch",)):
            _detector_row(page, name, replace_fields(specs[name], {"runtime": runtime}), photos)
    page.table(
        "Torchvision, trained, from the same JPEG (images of ISBI 2012 that it has not seen)",
        "pixels",
        "class maps equal",
        "IoU of membranes, ours / theirs",
    )
    for name in (name for name in there if specs[name].task is Task.SEGMENT):
        _segmenter_row(page, name, specs[name], membranes(run.shared / "data", held_out=True))


def answers(spec: ModelSpec, files: Sequence[Path], **overrides: Any) -> list[Any]:
    """What the service predicts from the files, by the same path as the server's."""
    with build_pipeline(ServerSettings.read(models=(), device="cpu"), [spec]) as pipeline:
        pipeline.catalog.load(spec)
        chosen = ParamOverrides(**overrides)
        results = list(pipeline.predict_many(files, task=spec.task, model=spec.name, overrides=chosen))
    for file, result in zip(files, results, strict=True):
        if not isinstance(result, Result):
            raise SystemExit(f"{file}: {result}")
    return [result.prediction for result in results]


def _library(name: str, **more: Any) -> nn.Module:
    network = library(name, **more)
    network.load_state_dict(load_file(weights_file(name)))
    return network.eval()


@dataclass
class _Tally:
    """What the photos of a row add up to."""

    ours: int = 0
    theirs: int = 0
    matched: int = 0
    lone: int = 0
    rounded: int = 0
    least: float = 1.0
    gap: float = 0.0
    masks: float = 1.0

    @property
    def good(self) -> bool:
        """Whether every object has its partner, or is decided by rounding."""
        return self.lone == 0 and self.matched > 0 and self.masks >= EQUAL_PIXELS

    def add(self, found: Detections, there: Theirs) -> tuple[list[int], list[int]]:
        """Count a photo in.

        Returns:
            Objects that are reported and have no partner, ours and theirs.
        """
        matches, overlaps, gaps = pairs(found, there)
        reported = found.scores >= REPORTED, there["scores"].numpy() >= REPORTED
        both = np.array([reported[0][i] and reported[1][j] for i, j in matches], bool)
        self.ours, self.theirs = self.ours + int(reported[0].sum()), self.theirs + int(reported[1].sum())
        self.matched += int(both.sum())
        self.least, self.gap = min([self.least, *overlaps[both]]), max([self.gap, *gaps[both]])
        chosen = (pair for pair, wanted in zip(matches, both, strict=True) if wanted)
        self.masks = min([self.masks, *(_equal_pixels(found, there, i, j) for i, j in chosen)])
        # Whoever is reported has a partner, which may lie below the threshold.
        partners = [{pair[side] for pair in matches} for side in (0, 1)]
        here, other = (
            [int(i) for i in np.flatnonzero(flags) if i not in have]
            for flags, have in zip(reported, partners, strict=True)
        )
        return here, other


def _detector_row(page: Page, name: str, spec: ModelSpec, photos: list[Path]) -> None:
    thresholds = {"box_score_thresh" if "rcnn" in name else "score_thresh": LOWEST}
    network = _library(name, **thresholds)
    ours: list[Detections] = answers(spec, photos, score_threshold=LOWEST)
    tally, theirs = _Tally(), []
    for index, (photo, found) in enumerate(zip(photos, ours, strict=True)):
        image = read(photo)
        with torch.inference_mode():
            there: Theirs = network([image])[0]
        lone = tally.add(found, there)
        # A hundred masks of a photo are 120 MB: what is kept of it is without them.
        theirs.append(as_detections(there, CELLS))
        if any(lone):
            shown = _shown(network, spec, photo, photos[index - 1], found, there, lone)
            tally.rounded += shown
            tally.lone += sum(map(len, lone)) - shown
    truth = [read_voc_annotation(p.parents[1] / "Annotations" / f"{p.stem}.xml") for p in photos]
    precision = [_map50(found, truth) for found in (ours, theirs)]
    total = tally.ours + tally.theirs - 2 * tally.matched
    page.row(
        f"{name}, {spec.runtime}",
        f"{tally.ours} / {tally.theirs}",
        f"{tally.matched}"
        + (f", {total - tally.lone - tally.rounded} at the threshold" if total > tally.lone + tally.rounded else "")
        + (f", {tally.lone} without a partner" if tally.lone else ""),
        str(tally.rounded),
        f"{tally.least:.4f}",
        f"{tally.gap:.4f}",
        f"{precision[0]:.3f} / {precision[1]:.3f}",
        f"{100 * tally.masks:.3f} %" if "masks" in there else "",
        ok=tally.good and abs(precision[0] - precision[1]) <= MAP_OFF,
    )


def _shown(
    network: Any,
    spec: ModelSpec,
    photo: Path,
    beside: Path,
    found: Detections,
    there: Theirs,
    lone: tuple[list[int], list[int]],
) -> int:
    """How many objects without a partner the library itself has or has not, as its input is rounded."""
    with torch.inference_mode():
        largest = input_gap(network, spec, photo)
    here, other = set[int](), set[int]()
    if largest <= ROUNDING:
        again = perturbed_answers(network, read(photo), read(beside), largest)
        here, other = decided_by_rounding(found, there, lone, again, CELLS)
    for side, indices, shown, boxes, scores in (
        ("ours", lone[0], here, found.boxes_xyxy, found.scores),
        ("theirs", lone[1], other, there["boxes"].numpy(), there["scores"].numpy()),
    ):
        for i in indices:
            verdict = "by rounding, as the library itself does" if i in shown else "WITHOUT A PARTNER"
            place = " ".join(f"{value:.2f}" for value in boxes[i])
            print(f"  {photo.stem}, {side}: {place}, score {scores[i]:.4f}: {verdict} ({largest:.1e})", flush=True)
    return len(here) + len(other)


def _equal_pixels(ours: Detections, theirs: Theirs, index: int, partner: int) -> float:
    if ours.mask_rles is None:
        return 1.0
    mask = theirs["masks"][partner, 0].numpy() >= 0.5
    return float((decode_rle(ours.mask_rles[index], mask.shape) == mask).mean())


def _map50(found: list[Detections], truth: list[AnnotatedBoxes]) -> float:
    return score_detections([above([one], LOWEST)[0] for one in found], truth, max_detections=300).map50


def _segmenter_row(page: Page, name: str, spec: ModelSpec, files: list[Path]) -> None:
    preset: Any = models.get_model_weights(name).DEFAULT.transforms()
    network = _library(name)
    equal, theirs, truth = 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        photos = [Path(folder) / f"{file.stem}.jpg" for file in files]
        for file, photo in zip(files, photos, strict=True):
            Image.open(file).convert("RGB").save(photo, quality=95)
        ours = [found.class_map for found in answers(spec, photos)]
        for file, photo, found in zip(files, photos, ours, strict=True):
            with torch.inference_mode():
                planes = network(preset(Image.open(photo).convert("RGB"))[None])["out"].softmax(1)
            full = nn.functional.interpolate(planes, found.shape, mode="bilinear")
            theirs.append(full.argmax(1)[0].numpy())
            equal += int((theirs[-1] == found).sum())
            truth.append(cv2.imread(str(file.parents[1] / "masks" / file.name), cv2.IMREAD_GRAYSCALE) < 128)
    total = sum(found.size for found in ours)
    ious = [_iou(found, truth) for found in (ours, theirs)]
    ok = equal >= EQUAL_PIXELS * total
    page.row(name, str(total), f"{100 * equal / total:.3f} %", f"{ious[0]:.3f} / {ious[1]:.3f}", ok=ok)


def _iou(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Of class 1, all images together."""
    here, there = (np.concatenate([np.ravel(one) for one in maps]) == 1 for maps in (found, truth))
    return float((here & there).sum() / max(1, (here | there).sum()))


AGAINST = f"""\
- **Torchvision, trained**: its own networks with weights that `make train-fidelity` trains for some minutes each, so
  that they detect something: they show that the answers agree, not how good the architectures are. Theirs is the
  library's own transform and network on the JPEG as Pillow decodes it, ours the whole served path. Required are the
  same objects from a score of 0.25 on, of equal class, one to one (IoU 0.98, score within 0.01), mAP within 0.3 points,
  and 99.5 % equal pixels of each mask and of the class maps. An object at the threshold may be reported by one side
  alone, if the other side has its partner below. The large ones are run at a shortest side of 192 pixels, which is what
  they were trained at.
  "Decided by rounding": suppression and the choice of proposals are decisions at a limit, and our input differs from
  the library's by the rounding of the resize (normalised, at most {ROUNDING:.0e}; where it is more, nothing is let
  off). For each photo with an object that has no partner the library is run {RUNS} times, seeded, on its own input with
  noise no larger than that difference in this photo, every second time beside another photo. An object counts as
  decided by rounding only if one of these answers has it and the library's plain answer has not (ours), or one of them
  lacks it (the library's). Any other object without a partner fails the row.
"""

SECTION = Section("trained", compare, AGAINST, short=f"{SHORT_PHOTOS} photos, networks whose weights are there")


if __name__ == "__main__":
    compare(Page(), Run(ROOT.parent / "shared", []), sys.argv[1:] or tuple(RECIPES))
