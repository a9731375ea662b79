"""The same network and the same preparation of images for every peer."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import models, transforms

from vision_service.backends.table import create_backend
from vision_service.runtimes.base import Execution, Workload
from vision_service.runtimes.choose import compile_network
from vision_service.weights.load import load_weights
from vision_service.weights.manifest import find_model

MANIFEST = Path(__file__).resolve().parents[1] / "models.toml"
Batch = list
TOP_K = 5

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_tensor(jpeg: bytes) -> torch.Tensor:
    """As the peers' documentation prepares an image: Pillow and torchvision's transforms; float32 ``[3, 224, 224]``."""
    return _TO_TENSOR(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def to_pixels(jpeg: bytes) -> np.ndarray:
    """The same without the floats: uint8 ``[224, 224, 3]``, for the network that normalises by itself."""
    return np.asarray(_TO_PIXELS(Image.open(io.BytesIO(jpeg)).convert("RGB")))


_TO_PIXELS = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
_TO_TENSOR = transforms.Compose([_TO_PIXELS, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def arguments() -> argparse.Namespace:
    """What every server of a peer is told, on its command line; its worker processes find it in their environment."""
    told = os.environ.setdefault("PEER_ARGUMENTS", " ".join(sys.argv[1:])).split()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--runtime", choices=["eager", "openvino"], default="eager")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1, help="processes that run the network")
    parser.add_argument("--threads", type=int, default=2, help="threads in each of them")
    parser.add_argument("--batch", type=int, default=16, help="largest batch")
    return parser.parse_args(told)


def preparation(runtime: str) -> Callable[[bytes], np.ndarray | torch.Tensor]:
    """How images are prepared for a runtime: ``eager`` or ``openvino``."""
    return to_tensor if runtime == "eager" else to_pixels


def network(model: str, runtime: str, precision: str, threads: int) -> Callable[[Batch], list[list]]:
    """A function from prepared images to the best classes of each, as ``[class, score]``.

    Args:
        model: ``mobilenet_v2`` with the weights that ship, or ``resnet50`` with random ones.
        runtime: ``eager``: torch as documentation writes it; ``openvino``: what vision-service itself runs.
        precision: ``fp32`` or ``bf16``.
        threads: inside one forward pass.
    """
    torch.set_num_threads(threads)
    if runtime == "eager":
        assert precision == "fp32", "as documentation writes it"
        return _best(_eager(model))
    spec = find_model(model, [MANIFEST])
    example = torch.zeros((1, 224, 224, 3), dtype=torch.uint8)
    compiled = compile_network(
        create_backend(spec).build(),
        Workload(example, max_batch_size=16),
        runtime=runtime,
        precision=precision,
        device=torch.device("cpu"),
        execution=Execution(threads),
    )

    def run(batch: Batch) -> torch.Tensor:
        images = torch.from_numpy(np.stack(batch))
        (logits,) = compiled.forward(images, torch.tensor([[224, 224]] * len(batch)))
        return logits

    return _best(run)


def _eager(model: str) -> Callable[[Batch], torch.Tensor]:
    made = getattr(models, model)(weights=None).eval()
    load_weights(made, find_model(model, [MANIFEST]))

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return made(torch.stack(list(batch)))

    return run


def _best(run: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], list[list]]:
    def best(batch: Batch) -> list[list]:
        scores, classes = run(batch).softmax(1).topk(TOP_K)
        return [
            list(map(list, zip(ids, found, strict=True)))
            for ids, found in zip(classes.tolist(), scores.tolist(), strict=True)
        ]

    return best
