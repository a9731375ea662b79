"""OpenCV 4.14's reader of Darknet files as a second opinion, in a process of its own.

OpenCV 5 no longer reads Darknet files, so the package lies in a folder beside the environment's own OpenCV.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from vision_service.networks.darknet import Darknet

REQUIREMENT = "opencv-python-headless==4.14.0.94"

_RUN = """
import sys
import numpy as np
import cv2
assert cv2.__version__.startswith("4.14."), cv2.__version__
cv2.setNumThreads(1)
network = cv2.dnn.readNetFromDarknet(sys.argv[1], sys.argv[2])
network.setPreferableBackend(cv2.dnn.DNN_BACKEND_OPENCV)
network.setInput(np.load(sys.argv[3]))
np.savez(sys.argv[4], *network.forward(network.getUnconnectedOutLayersNames()))
"""


def install(folder: Path) -> str:
    """Install the package into a folder.

    Returns:
        Why it could not be, or nothing.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]


def detect(folder: Path, cfg: str, weights: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What OpenCV's network gives before suppression.

    Args:
        folder: from `install`.
        cfg: the text.
        weights: the file.
        images: float32 ``[N, 3, h, w]``, 0..1.

    Returns:
        Boxes ``[N, A, 4]`` as centre x, y, width and height in parts of the input, and scores ``[N, A, C]``.
    """
    # OpenCV makes scores below a threshold zero; the key, which is its own, turns that off.
    cfg = cfg.replace("[yolo]", "[yolo]\nthresh=-1")
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        (where / "net.cfg").write_text(cfg)
        (where / "net.weights").write_bytes(weights)
        np.save(where / "images.npy", images)
        files = [where / "net.cfg", where / "net.weights", where / "images.npy", where / "outputs.npz"]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, "-c", _RUN, *map(str, files)], env=environment, check=True)
        with np.load(where / "outputs.npz") as outputs:
            rows = [outputs[key].reshape(len(images), -1, outputs[key].shape[-1]) for key in outputs.files]
    both = np.concatenate(rows, axis=1)
    return both[..., :4], both[..., 5:]


def as_parts(boxes_xyxy: np.ndarray, input_hw: tuple[int, int]) -> np.ndarray:
    """Our boxes ``[..., 4]`` in pixels as OpenCV's: centre, width and height in parts of the input."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return np.concatenate(((low + high) / 2, high - low), axis=-1) / np.array(input_hw[::-1] * 2, np.float32)


@torch.no_grad()
def randomise(network: Darknet, seed: int) -> Darknet:
    """Give a network weights that keep its values in range and its outputs different from place to place.

    Batch norms get the statistics of a noisy image. Narrow scales with wide biases keep the activations almost linear:
    a hundred random layers would otherwise blow up float32's last digit until no two engines agree.
    """
    torch.manual_seed(seed)
    for layer in network.convolutions():
        torch.nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="linear")
        if layer.norm is not None:
            layer.norm.momentum = 1.0
            torch.nn.init.uniform_(layer.norm.weight, 0.3, 0.5)
            torch.nn.init.normal_(layer.norm.bias, std=0.5)
        elif layer.conv.bias is not None:
            layer.conv.weight.mul_(0.25)
            torch.nn.init.normal_(layer.conv.bias, std=0.3)
    network.train()(torch.rand(4, network.channels, *network.size_hw))
    return network.eval()
