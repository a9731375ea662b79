"""Train SegNet on a folder of images and masks, serve it, and compare it with the trivial answers on what it never saw.

    make train-segnet
    python scripts/train_segnet.py [--data ../shared/data/isbi2012] [--minutes 10] [--output results/segnet]

The folder has ``images/`` and ``masks/`` with files of the same names; a mask is white where class 1 is. Every sixth
image is held out. Writes the weights and a manifest into the output's folder, loads them with the service's own
pipeline and measures what that answers. Fails when the loss did not fall or an IoU does not beat the trivial one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from vision_service.engine.build import local_pipeline
from vision_service.networks.segnet import SegNet, init_encoder_from_vgg16_bn
from vision_service.types import Result, Task

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = 127.5, 64.0
HOLD_OUT_EVERY = 6

MANIFEST = """# Written by scripts/train_segnet.py.
[[model]]
name = "{name}"
task = "segment"
backend = "segnet"
options = {{ width = {width} }}
classes = {classes}
batching = {{ max_batch_size = 1 }}

[model.preprocess]
resize = {{ mode = "native", pad_multiple = 32 }}
mean = [{mean}, {mean}, {mean}]
std = [{std}, {std}, {std}]

[model.weights]
file = "segnet.safetensors"
sha256 = "{sha256}"
licence = "of the training images"
source = "scripts/train_segnet.py"
"""


def read_pairs(folder: Path) -> list[tuple[Path, np.ndarray, np.ndarray]]:
    """Path, uint8 ``[H, W, 3]`` RGB and bool ``[H, W]`` of each pair, in order of their names."""
    pairs = []
    for file in sorted((folder / "images").iterdir(), key=lambda path: (len(path.stem), path.stem)):
        image, mask = cv2.imread(str(file)), cv2.imread(str(folder / "masks" / file.name), cv2.IMREAD_GRAYSCALE)
        if image is None or mask is None:
            sys.exit(f"{file} or its mask cannot be read")
        pairs.append((file, np.ascontiguousarray(image[..., ::-1]), mask > 127))
    return pairs


def batches(images: list[np.ndarray], masks: list[np.ndarray], size: int, crop: int, seed: int):
    """For ever: random crops, turned and mirrored; float ``[size, 3, crop, crop]`` and int64 ``[size, crop, crop]``."""
    rng = np.random.default_rng(seed)
    while True:
        x, y = [], []
        for index in rng.integers(len(images), size=size):
            image, mask = images[index], masks[index]
            top, left = (int(rng.integers(side - crop + 1)) for side in mask.shape)
            window = slice(top, top + crop), slice(left, left + crop)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            pair = [np.rot90(array[window], turns) for array in (image, mask)]
            pair = [np.flip(array, 1) if mirrored else array for array in pair]
            x.append(np.ascontiguousarray(pair[0]).transpose(2, 0, 1))
            y.append(np.ascontiguousarray(pair[1]))
        pixels = torch.from_numpy(np.stack(x)).float()
        yield (pixels - MEAN) / STD, torch.from_numpy(np.stack(y)).long()


def median_frequency_weights(masks: list[np.ndarray]) -> Tensor:
    """A weight for each class: the median class's share of the pixels over its own (section 3.3 of the paper)."""
    share = np.mean([mask.mean() for mask in masks])
    shares = np.array([1 - share, share])
    return torch.tensor(np.median(shares) / shares, dtype=torch.float32)


def train(network: SegNet, data, weight: Tensor | None, minutes: float) -> list[float]:
    """SGD with momentum 0.9, as published, under a one-cycle rate; returns the loss of every step."""
    rate, losses = 0.05, []
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    network.train()
    started = time.monotonic()
    while (passed := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 10 * passed + 0.02) * (1 - passed) ** 0.9
        x, y = next(data)
        loss = functional.cross_entropy(network(x), y, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"step {len(losses)}, {60 * minutes * passed:.0f} s: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return losses


def write_model(network: SegNet, folder: Path, name: str, width: int, classes: list[str]) -> Path:
    """Weights and a manifest that the service reads."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, manifest = folder / "segnet.safetensors", folder / "manifest.toml"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, str(weights))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest.write_text(
        MANIFEST.format(name=name, width=width, classes=json.dumps(classes), mean=MEAN, std=STD, sha256=digest)
    )
    return manifest


def ious(found: list[np.ndarray], truth: list[np.ndarray]) -> np.ndarray:
    """Intersection over union of both classes, all pixels counted together; ``[2]``."""
    a, b = np.concatenate([m.ravel() for m in found]), np.concatenate([m.ravel() for m in truth])
    return np.array([(~a & ~b).sum() / max(1, (~a | ~b).sum()), (a & b).sum() / max(1, (a | b).sum())])


def served(manifest: Path, name: str, files: list[Path]) -> list[np.ndarray]:
    """Where the service finds class 1; bool ``[H, W]`` each."""
    found = []
    with local_pipeline([name], manifests=[manifest], device="cpu") as pipeline:
        for file, result in zip(files, pipeline.predict_many(files, task=Task.SEGMENT, model=name), strict=True):
            if not isinstance(result, Result):
                sys.exit(f"{file}: {result}")
            found.append(result.prediction.mask(1))
    return found


def report(found: list[np.ndarray], truth: list[np.ndarray], classes: list[str]) -> bool:
    """Print the table; whether every IoU beats both trivial answers."""
    rows = {"SegNet, as served": ious(found, truth)}
    for value, name in enumerate(classes):
        rows[f"trivial: all {name}"] = ious([np.full(mask.shape, bool(value)) for mask in truth], truth)
    print(f"\n| answer | {' | '.join(f'IoU {name}' for name in classes)} | mean IoU |\n|{' --- |' * 4}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} | {row.mean():.3f} |")
    ours, *trivial = rows.values()
    return bool((ours > np.max(trivial, axis=0)).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/isbi2012")
    parser.add_argument("--classes", nargs=2, default=["membrane", "cell"], metavar=("BLACK", "WHITE"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--width", type=int, default=12, help="channels of the first stage; 64 as published")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--balance", action="store_true", help="median frequency balancing, for rare classes")
    parser.add_argument("--vgg16-bn", type=Path, help="torchvision's vgg16_bn state dict to start from (--width 64)")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/segnet"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    pairs = read_pairs(args.data)
    held_out = pairs[::HOLD_OUT_EVERY]
    kept = [pair for index, pair in enumerate(pairs) if index % HOLD_OUT_EVERY]
    network = SegNet(len(args.classes), args.width)
    if args.vgg16_bn:
        init_encoder_from_vgg16_bn(network, torch.load(args.vgg16_bn, map_location="cpu", weights_only=True))
    images, masks = [pair[1] for pair in kept], [pair[2] for pair in kept]
    data = batches(images, masks, args.batch, args.crop, args.seed)
    print(f"{len(kept)} images to learn from, {len(held_out)} held out", flush=True)
    losses = train(network, data, median_frequency_weights(masks) if args.balance else None, args.minutes)
    tenth = max(1, len(losses) // 10)
    first, last = np.mean(losses[:tenth]), np.mean(losses[-tenth:])
    print(f"{len(losses)} steps; loss {first:.3f} (first tenth) to {last:.3f} (last tenth)")
    manifest = write_model(network, args.output, "segnet", args.width, args.classes)
    found = served(manifest, "segnet", [pair[0] for pair in held_out])
    better = report(found, [pair[2] for pair in held_out], args.classes)
    print(f"\nwrote {manifest}")
    if not better or last >= first:
        sys.exit("not learnt: the loss did not fall, or a trivial answer is as good")


if __name__ == "__main__":
    main()
