"""Write tests/data/reference_darknet_tiny.npz: what OpenCV 4.14 makes of tests/data/darknet_tiny.cfg.

    python scripts/reference_darknet.py

Fetches that OpenCV from PyPI. The weights are random; our network only lends its shapes to make them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import opencv_darknet

from vision_service.networks.darknet import Darknet
from vision_service.networks.darknet_weights import write_weights

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"


def main() -> None:
    cfg = (DATA / "darknet_tiny.cfg").read_text()
    weights = write_weights(opencv_darknet.randomise(Darknet(cfg), seed=0), seen=64)
    # One image: OpenCV's scale_channels fails on batches.
    image = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3), np.uint8)
    inputs = np.ascontiguousarray(image.transpose(0, 3, 1, 2)).astype(np.float32) / 255
    with tempfile.TemporaryDirectory() as folder:
        if problem := opencv_darknet.install(Path(folder)):
            sys.exit(problem)
        boxes, scores = opencv_darknet.detect(Path(folder), cfg, weights, inputs)
    target = DATA / "reference_darknet_tiny.npz"
    np.savez_compressed(
        target, image=image, weights=np.frombuffer(weights, np.uint8), boxes=boxes.astype(np.float32), scores=scores
    )
    print(f"{target}: {target.stat().st_size} bytes, boxes {boxes.shape}, largest score {scores.max():.3f}")


if __name__ == "__main__":
    main()
