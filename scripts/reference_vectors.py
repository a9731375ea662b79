"""Write tests/data/reference_*.npz: inputs, and what the ORIGINAL engines make of them.

    python scripts/reference_vectors.py [--originals ../shared/pretrained] [--out tests/data] --tfjs FOLDER

NanoDet-g runs in ONNX Runtime, selfie segmentation in LiteRT (see `originals` for its last operator), ESRGAN-slim in
TensorFlow.js, MobileNetV2 in torchvision with the float32 checkpoint. Needs the extra ``fidelity``, and for ESRGAN
node with ``@tensorflow/tfjs`` installed in FOLDER. None of our networks takes part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import cv2
import numpy as np
import originals
import torch
from torchvision import models

Array = np.ndarray


def scene(size: int) -> Array:
    """A person drawn with ellipses before coloured rectangles: uint8 RGB ``[size, size, 3]``.

    Drawn rather than photographed so that it compresses to nothing; the segmentation network takes it for a person.
    """
    rng = np.random.RandomState(7)
    image = np.full((size, size, 3), (176, 190, 200), np.uint8)
    scale = size / 256

    def ellipse(centre: tuple[int, int], axes: tuple[int, int], color: tuple[int, int, int]) -> None:
        whole = [tuple(int(value * scale) for value in pair) for pair in (centre, axes)]
        cv2.ellipse(image, *whole, 0, 0, 360, color, -1)

    for _ in range(12):
        x, y, width, height = (int(value) for value in rng.randint(0, 256, 4) * scale)
        color = tuple(int(value) for value in rng.randint(100, 230, 3))
        cv2.rectangle(image, (x, y), (x + width // 3, y + height // 3), color, -1)
    ellipse((128, 250), (92, 90), (40, 60, 120))
    ellipse((128, 150), (24, 40), (205, 160, 135))
    ellipse((128, 70), (56, 52), (60, 40, 30))
    ellipse((128, 95), (44, 58), (224, 178, 150))
    for x in (110, 146):
        ellipse((x, 85), (8, 4), (250, 250, 250))
        ellipse((x, 85), (4, 4), (50, 35, 30))
        ellipse((x, 74), (11, 2), (60, 40, 30))
    ellipse((128, 104), (5, 12), (205, 155, 130))
    ellipse((128, 128), (15, 5), (170, 70, 70))
    return image


def _sample(values: Array, count: int, first: Array | None = None) -> tuple[Array, Array]:
    """Flat positions, those in ``first`` and random ones, and the values there."""
    rng = np.random.RandomState(1)
    positions = rng.choice(values.size, min(count, values.size), replace=False)
    if first is not None:
        positions = np.concatenate((first[:count], positions))
    positions = np.unique(positions).astype(np.int32)
    return positions, values.ravel()[positions]


def nanodet_g(folder: Path) -> dict[str, Array]:
    image = scene(416)
    mean, std = np.array([103.53, 116.28, 123.675]), np.array([57.375, 57.12, 58.395])
    x = ((image[:, :, ::-1] - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
    vectors = {"image": image}
    for stride, (scores, distances) in zip(
        (8, 16, 32), originals.nanodet_g(folder)(np.ascontiguousarray(x)), strict=True
    ):
        strongest = np.argsort(scores.ravel())[::-1]
        vectors[f"score_positions_{stride}"], vectors[f"scores_{stride}"] = _sample(scores, 1000, strongest)
        vectors[f"distance_positions_{stride}"], vectors[f"distances_{stride}"] = _sample(distances, 2000)
    return vectors


def selfie_segmentation(folder: Path) -> dict[str, Array]:
    image = scene(256)
    probability = originals.selfie_segmentation(folder)(image.astype(np.float32) / 255)
    unsure = np.flatnonzero((probability > 0.01) & (probability < 0.99))
    positions, values = _sample(probability, 3000, unsure)
    return {"image": image, "positions": positions, "probabilities": values}


def mobilenet_v2(folder: Path) -> dict[str, Array]:
    network = models.mobilenet_v2(weights=None).eval()
    checkpoint = folder / "mobilenet_v2/mobilenet_v2-b0353104.pth"
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    image = scene(224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return {"image": image, "logits": network(x)[0].numpy()}


def esrgan_slim_x2(folder: Path, tfjs: Path) -> dict[str, Array]:
    image = cv2.resize(scene(256), (32, 28), interpolation=cv2.INTER_AREA)
    with tempfile.TemporaryDirectory(dir=tfjs) as scratch:
        script = shutil.copy(Path(__file__).with_name("reference_esrgan.mjs"), scratch)
        height, width = image.shape[:2]
        given, got = Path(scratch) / "input.json", Path(scratch) / "output.json"
        given.write_text(json.dumps({"height": height, "width": width, "pixels": image.ravel().tolist()}))
        subprocess.run(["node", script, str((folder / "esrgan_slim/x2").resolve()), given, got], check=True)
        result = json.loads(got.read_text())
    return {
        "image": image,
        "output": np.array(result["pixels"], np.float32).reshape(result["height"], result["width"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=Path, default=Path("../shared/pretrained"))
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    parser.add_argument("--tfjs", type=Path, required=True, help="folder where @tensorflow/tfjs is installed")
    args = parser.parse_args()
    vectors = {
        "nanodet_g": nanodet_g(args.originals),
        "selfie_segmentation": selfie_segmentation(args.originals),
        "mobilenet_v2": mobilenet_v2(args.originals),
        "esrgan_slim_x2": esrgan_slim_x2(args.originals, args.tfjs),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, arrays in vectors.items():
        target = args.out / f"reference_{name}.npz"
        np.savez_compressed(target, **arrays)
        print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
