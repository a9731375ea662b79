"""Train torchvision's networks for some minutes each, so that `make fidelity` can compare what they answer.

    make train-fidelity
    python scripts/train_fidelity.py [NAME...] [--data ../shared/data] [--minutes-a-run 0] [--scale 1]

Detectors learn blood cells from ``bccd``'s train split, Mask R-CNN with an ellipse in each box for a mask; the
segmenter learns membranes from ``isbi2012``. Weights go to ``build/fidelity`` and are not trained again while they are
there. A run that was stopped goes on from its checkpoint; ``--minutes-a-run`` stops after that many, for machines that
are shared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor
from trained import CACHE, CELLS, RECIPES, ROOT, Recipe, library, weights_file

from vision_service.evaluation.voc import read_voc_annotation

Loss = Callable[[], Tensor]

# What makes training affordable on a core and leaves inference as it is.
_CHEAPER = {"box_batch_size_per_image": 64}
HELD_OUT = 6
"""Every sixth image of isbi2012 is for the comparison."""


def cells(data: Path, split: str) -> list[Path]:
    """The photos of a split of BCCD."""
    names = (data / f"bccd/ImageSets/Main/{split}.txt").read_text().split()
    return [data / f"bccd/JPEGImages/{name}.jpg" for name in names]


def membranes(data: Path, *, held_out: bool) -> list[Path]:
    """Images of isbi2012, those to learn from or the others."""
    files = sorted((data / "isbi2012/images").iterdir(), key=lambda path: (len(path.stem), path.stem))
    return [file for index, file in enumerate(files) if (index % HELD_OUT == 0) == held_out]


def detector_losses(network: Any, data: Path, recipe: Recipe, rng: np.random.Generator) -> Iterator[Loss]:
    """For ever: what computes the loss of a batch of cells, mirrored at random."""
    masks = hasattr(network, "roi_heads") and network.roi_heads.has_mask()
    known = [network.transform.resize(*_cell(file, masks)) for file in cells(data, "train")]
    while True:
        images, targets = [], []
        for index in rng.integers(len(known), size=recipe.batch):
            image, target = known[index]
            for axis in (1, 2):
                if rng.integers(2):
                    image, target = _mirrored(image, target, axis)
            images.append(image)
            targets.append(target)
        yield lambda images=images, targets=targets: sum(network(images, targets).values())


def _cell(file: Path, masks: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A photo, float ``[3, H, W]``, and what torchvision's detectors are told of it."""
    with Image.open(file) as opened:
        image = pil_to_tensor(opened.convert("RGB")) / 255
    truth = read_voc_annotation(file.parents[1] / "Annotations" / f"{file.stem}.xml")
    boxes = torch.from_numpy(truth.boxes_xyxy).float()  # they are in double precision, which FCOS does not take
    target = {"boxes": boxes, "labels": torch.tensor([CELLS.index(name) for name in truth.class_names])}
    if masks:
        target["masks"] = torch.from_numpy(np.stack([_ellipse(box, image.shape[1:]) for box in boxes.numpy()]))
    return image, target


def _ellipse(box_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The ellipse that touches a box's sides, uint8 ``[H, W]``: cells are round."""
    x1, y1, x2, y2 = (float(value) for value in box_xyxy)
    mask = np.zeros(size_hw, np.uint8)
    cv2.ellipse(mask, (((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1), 0.0), 1, -1)
    return mask


def _mirrored(image: Tensor, target: dict[str, Tensor], axis: int) -> tuple[Tensor, dict[str, Tensor]]:
    """An image ``[3, H, W]`` and its target, turned over along an axis."""
    low, high = (0, 2) if axis == 2 else (1, 3)
    boxes = target["boxes"].clone()
    boxes[:, [low, high]] = image.shape[axis] - boxes[:, [high, low]]
    flipped = target | {"boxes": boxes}
    if "masks" in target:
        flipped["masks"] = target["masks"].flip(axis)
    return image.flip(axis), flipped


def segmenter_losses(network: nn.Module, data: Path, recipe: Recipe, rng: np.random.Generator) -> Iterator[Loss]:
    """For ever: what computes the loss of a batch of crops of 256 x 256, turned and mirrored at random."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    known = []
    for file in membranes(data, held_out=False):
        mask = cv2.imread(str(file.parents[1] / "masks" / file.name), cv2.IMREAD_GRAYSCALE)
        image = (pil_to_tensor(Image.open(file).convert("RGB")) / 255 - mean) / std
        known.append(torch.cat((image, torch.from_numpy(mask < 128)[None].float())))  # [4, H, W]; membranes are black
    while True:
        crops = []
        for index in rng.integers(len(known), size=recipe.batch):
            top, left = (int(rng.integers(side - 255)) for side in known[index].shape[1:])
            crop = known[index][:, top : top + 256, left : left + 256].rot90(int(rng.integers(4)), (1, 2))
            crops.append(crop.flip(2) if rng.integers(2) else crop)
        pixels, truth = torch.stack(crops).split((3, 1), dim=1)
        yield lambda x=pixels, y=truth: functional.cross_entropy(network(x)["out"], y[:, 0].long())


def train(name: str, data: Path, scale: float, minutes_a_run: float) -> bool:
    """Train one network, or go on with it; whether it is done.

    Its minutes are CPU time, so that work beside it makes training longer and not less.

    Args:
        name: in `RECIPES`.
        data: folder with ``bccd/`` and ``isbi2012/``.
        scale: of the recipe's minutes.
        minutes_a_run: of CPU time, after which to stop and keep a checkpoint; 0: when it is done.
    """
    recipe, checkpoint = RECIPES[name], CACHE / f"{name}.checkpoint"
    torch.manual_seed(0)
    network = library(name, **(_CHEAPER if "rcnn" in name else {})).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.rate, weight_decay=1e-4)
    passed, steps = 0.0, 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        passed, steps = kept["passed"], kept["steps"]
    losses_of = detector_losses if hasattr(network, "transform") else segmenter_losses
    data_losses, recent = losses_of(network, data, recipe, np.random.default_rng(steps)), []
    whole, before, started = recipe.minutes * scale * 60, passed, time.process_time()
    while passed < whole and (not minutes_a_run or passed - before < 60 * minutes_a_run):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (steps + 1) / 30, 4 * (1 - passed / whole) + 0.02)
        loss = next(data_losses)()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        steps, passed = steps + 1, before + time.process_time() - started
        recent.append(loss.item())
        if len(recent) == 20:
            print(f"{name}: step {steps}, {passed:.0f} of {whole:.0f} s: loss {np.mean(recent):.3f}", flush=True)
            recent.clear()
    if passed < whole:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "passed": passed, "steps": steps}
        _replace(checkpoint, lambda part: torch.save(state, part))
        return False
    settle_norms(network, data_losses)
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    _replace(weights_file(name), lambda part: save_file(tensors, part))
    checkpoint.unlink(missing_ok=True)
    return True


def settle_norms(network: nn.Module, data_losses: Iterator[Loss], batches: int = 20) -> None:
    """Measure the batch norms' statistics anew: MobileNet's remember a hundred steps, which is half of the training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(batches):
            next(data_losses)()


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    write(part)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RECIPES)}; all without any")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data", help="folder with bccd/ and isbi2012/"
    )
    parser.add_argument("--minutes-a-run", type=float, default=0.0, help="stop after so many and go on another time")
    parser.add_argument("--scale", type=float, default=1.0, help="of the minutes that each network is trained")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RECIPES):
        sys.exit(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in args.names or RECIPES:
        if weights_file(name).exists():
            print(f"{name}: {weights_file(name)} is there")
        elif train(name, args.data, args.scale, args.minutes_a_run):
            print(f"{name}: wrote {weights_file(name)}")
        else:
            print(f"{name}: stopped for now; the same command goes on")
            return


if __name__ == "__main__":
    main()
