"""Compare what is served with what the models' original implementations give, and write docs/fidelity.md.

    make fidelity
    python scripts/fidelity.py [--data ../shared] [--output docs/fidelity.md] [--device cpu]

Our side is `vision_service.engine.build.local_pipeline`: the same decoding, preprocessing, batching, networks and
postprocessing that the server runs. The other side is described in the page itself. Needs the extra ``fidelity`` and a
folder with ``data/`` and ``pretrained/`` that is not part of the project. Fails if a figure misses what is required.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import cv2
import fidelity_darknet
import fidelity_smp_timm
import fidelity_torchvision
import numpy as np
import originals
import torch
from PIL import Image
from torchvision import models

from vision_service.engine.build import local_pipeline
from vision_service.engine.pipeline import Pipeline
from vision_service.evaluation.detection import score_detections
from vision_service.evaluation.voc import AnnotatedBoxes, read_voc_annotation
from vision_service.types import Detections, ParamOverrides, Result, Task
from vision_service.weights.manifest import find_model

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "numpy", "opencv-python", "pycocotools", "onnxruntime", "onnx", "ai-edge-litert")

# Two classes of ImageNet are called cardigan and two are called crane, so their files' names do not tell.
AMBIGUOUS = {"n02012849": 134, "n02113186": 264, "n02963159": 474}

VOC_NAMES = {
    "airplane": "aeroplane",
    "motorcycle": "motorbike",
    "couch": "sofa",
    "potted plant": "pottedplant",
    "dining table": "diningtable",
    "tv": "tvmonitor",
}


@dataclass
class Page:
    """The lines of the document, and what missed its mark."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def table(self, *header: str) -> None:
        """Start a table."""
        self.lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]

    def row(self, *cells: str, ok: bool = True) -> None:
        """Add a row; a figure that is not good enough makes the command fail."""
        print(" | ".join(cells), flush=True)
        self.lines.append(f"| {' | '.join(cells)} |")
        if not ok:
            self.missed.append(" | ".join(cells))


def predictions(pipeline: Pipeline, files: list[Path], **call: object) -> Iterator[Result]:
    for file, result in zip(files, pipeline.predict_many(files, **call), strict=True):
        if not isinstance(result, Result):
            raise SystemExit(f"{file}: {result}")
        yield result


def class_of(file: Path, class_names: tuple[str, ...]) -> int:
    """ImageNet's class of a file called like n01494475_hammerhead.JPEG."""
    wnid, name = file.stem.split("_", 1)
    if wnid in AMBIGUOUS:
        return AMBIGUOUS[wnid]
    (found,) = [i for i, c in enumerate(class_names) if c.lower().replace(" ", "_").replace("'", "") == name.lower()]
    return found


def reference_classifier(originals_folder: Path, files: list[Path]) -> np.ndarray:
    """Torchvision's network, checkpoint and transforms: probabilities ``[N, 1000]``."""
    network = models.mobilenet_v2(weights=None).eval()
    checkpoint = originals_folder / "mobilenet_v2/mobilenet_v2-b0353104.pth"
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    transform = models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        rows = [network(transform(Image.open(file).convert("RGB"))[None]).softmax(1)[0] for file in files]
    return torch.stack(rows).numpy()


def classification(page: Page, pipeline: Pipeline, shared: Path) -> None:
    files = sorted((shared / "data/imagenet100").glob("*.JPEG"))
    names = find_model("mobilenet_v2").classes
    truth = np.array([class_of(file, names) for file in files])
    if not np.all(np.diff(truth) > 0):  # torchvision's classes are in the order of their WordNet ids
        raise SystemExit("a file was taken for the wrong class: ids must rise with the WordNet ids")
    everything = {"task": Task.CLASSIFY, "model": "mobilenet_v2", "overrides": ParamOverrides(top_k=1000)}
    ours = np.zeros((len(files), len(names)), np.float32)
    for row, result in zip(ours, predictions(pipeline, files, **everything), strict=True):
        row[result.prediction.class_ids] = result.prediction.scores
    theirs = reference_classifier(shared / "pretrained", files)
    page.table("MobileNetV2 on imagenet100", "ours", "torchvision")
    for k in (1, 5):
        right = [(np.argsort(-p, axis=1)[:, :k] == truth[:, None]).any(axis=1).sum() for p in (ours, theirs)]
        page.row(f"top-{k} right, of {len(files)}", *map(str, right), ok=abs(int(right[0]) - int(right[1])) <= 1)
    agreed = int((ours.argmax(1) == theirs.argmax(1)).sum())
    page.row("same top-1 class", str(agreed), f"of {len(files)}", ok=agreed >= 0.99 * len(files))
    page.row("largest difference of a probability", f"{np.abs(ours - theirs).max():.4f}", "")


def detection(page: Page, pipeline: Pipeline, shared: Path) -> None:
    folder = shared / "data/voc30"
    files = sorted((folder / "images").iterdir())
    annotated = [read_voc_annotation(folder / "annotations" / f"{file.stem}.xml") for file in files]
    counted = [AnnotatedBoxes(a.boxes_xyxy, a.class_names, np.zeros_like(a.difficult)) for a in annotated]
    overrides = ParamOverrides(score_threshold=0.01, iou_threshold=0.5, max_detections=300)
    found = []
    for result in predictions(pipeline, files, task=Task.DETECT, model="nanodet_g", overrides=overrides):
        p: Detections = result.prediction
        names = tuple(VOC_NAMES.get(name, name) for name in p.class_names)
        found.append(Detections(p.boxes_xyxy, p.class_ids, names, p.scores))
    page.table("NanoDet-g on voc30", "mAP at IoU 0.5", "mAP at IoU 0.5 to 0.95", "person, AP at IoU 0.5")
    for what, truth in (("all objects counted", counted), ("VOC's rule: difficult ones left out", annotated)):
        score = score_detections(found, truth, max_detections=300)
        figures = (score.map50, score.map50_95, score.ap50_by_class["person"])
        page.row(f"{what}, {len(score.ap50_by_class)} classes", *(f"{f:.3f}" for f in figures), ok=score.map50 >= 0.635)


def segmentation(page: Page, pipeline: Pipeline, shared: Path, photos: list[Path]) -> None:
    run = originals.selfie_segmentation(shared / "pretrained")
    page.table(
        "selfie segmentation on samples/", "person pixels, ours", "original", "IoU of the masks", "pixels that differ"
    )
    for file, result in zip(
        photos, predictions(pipeline, photos, task=Task.SEGMENT, model="selfie_segmentation"), strict=True
    ):
        image = np.asarray(Image.open(file).convert("RGB"))
        probability = run(cv2.resize(image, (256, 256)).astype(np.float32) / 255)
        theirs = cv2.resize(probability, image.shape[1::-1]) >= 0.5
        ours = result.prediction.mask(1)
        differ, union = int((ours ^ theirs).sum()), int((ours | theirs).sum())
        iou = "both empty" if union == 0 else f"{(ours & theirs).sum() / union:.4f}"
        counts = (str(int(ours.sum())), str(int(theirs.sum())))
        page.row(file.name, *counts, iou, str(differ), ok=union == 0 or differ <= 0.01 * union)


def translation(page: Page, pipeline: Pipeline, shared: Path, photos: list[Path]) -> None:
    run = originals.esrgan_slim_x2(shared / "pretrained")
    page.table("ESRGAN-slim x2 on samples/", "size", "largest difference, of 255", "pixel values that differ")
    for file, result in zip(
        photos, predictions(pipeline, photos, task=Task.TRANSLATE, model="esrgan_slim_x2"), strict=True
    ):
        theirs = run(np.asarray(Image.open(file).convert("RGB"), np.float32)).round().clip(0, 255)
        difference = np.abs(result.prediction.image.astype(np.int16) - theirs.astype(np.int16))
        height, width = theirs.shape[:2]
        share = f"{100 * np.count_nonzero(difference) / difference.size:.3f} %"
        page.row(file.name, f"{width} x {height}", str(difference.max()), share, ok=difference.max() <= 1)


INTRODUCTION = """# Fidelity

How far what is served agrees with the models' original implementations. Written by

    make fidelity

which runs `scripts/fidelity.py`: change that, not this page. It needs the extra `fidelity` and a folder that is not
part of the project, `../shared` unless `--data` says otherwise, with the photos (`data/`) and the original model files
(`pretrained/`). The command fails if a figure misses what is required of it. `tests/unit/test_networks_reference.py`
holds the networks alone to the originals' outputs, within 1e-4 (MobileNetV2, whose weights are rounded: probabilities
within 2e-3), and needs neither.

"Ours" is the whole way of a request in process, from the file's bytes to the prediction, which is the path that the
server runs; on {device}, {precision}. Made with

{versions}"""

ORACLES = """
## What each was compared with

- **MobileNetV2**: torchvision's network and its float32 checkpoint, with its own transforms on images that Pillow
  decoded. Ours has convolutions and classifier rounded to half precision to halve the file. The photos are probably
  from ImageNet's training set, so accuracy reads higher than the published 71.9 % / 90.3 %; what counts is the
  difference between the columns.
- **NanoDet-g**: annotations made by people. Scores down to 0.01, suppression class by class at an overlap of 0.5,
  COCO's names mapped to VOC's, mean over the classes present, by pycocotools. Independent reference code gave 0.643
  (person 0.707) on these photos, all objects counted, with VOC's matching and precision at every recall; pycocotools
  matches a box to the best object that is still free and samples 101 recalls, which by itself moves these figures.
  Required is 0.635. Thirty photos are few: they can show a mistake in pre- or postprocessing, not rank detectors.
- **Selfie segmentation**: the TFLite graph in LiteRT, on the photo stretched to 256 x 256 by OpenCV, the probability
  stretched back and cut at 0.5. The graph's last operator, `Convolution2DTransposeBias`, is MediaPipe's own and
  unknown to LiteRT; the built-in `TRANSPOSE_CONV` with the same weights takes its place. Required is an IoU of 0.99.
  The network is made for one person in front of a camera: it takes the cat and part of the coffee table for one, and
  so does the original.
- **Torchvision**: its own networks, transforms and postprocessing, with seeded random weights on both sides, since
  the official ones have to be fetched. Detectors and segmenters are compared on the pixels that enter our network,
  and those with the library's in grey levels: ours are rounded, which a random network magnifies until the library
  disagrees with itself ("from the file"). Required are the same boxes (IoU 0.98, score within 0.01) and classes, and
  at most one grey level (two for antialiased resizing). Ours leaves out boxes without area and `__background__` on
  purpose.
- **Ultralytics** (only when that package is installed): its own `predict` with its defaults, with seeded random weights
  on both sides, since the official ones have to be fetched. "Same tensor" is the largest difference of what the heads
  return, boxes as parts of the input's longer side. Masks of ours are those of `Results.masks`, taken to the photo's
  size by the library's `scale_masks` and cut at one half. Ours leaves out boxes that have no area inside the photo, and
  keeps a score that is equal to the threshold, on purpose. Required are equally many objects of equal class (IoU 0.98,
  score within 0.01), masks with 99.5 % equal pixels, equal top-1 classes, and 1e-4 on the same tensor.
- **ESRGAN-slim**: the Keras layers of the TensorFlow.js model, rebuilt one by one as ONNX operators, in ONNX Runtime,
  rounded to whole numbers. A test holds that rebuild to what TensorFlow.js itself returned. Required is a difference
  of at most 1 of 255.
- **Darknet**: OpenCV 4.14, which still reads Darknet files (OpenCV 5 does not), on the same cfg, weights and pixels,
  before suppression; then both followed by class-wise suppression at 0.5. Required is 1e-4, and mAP within 0.3 points.
  OpenCV drops scores below 0.2, hence the second row of the mAP; for the first that is turned off. YOLOv3 and YOLOv4
  with their own weights have not been run: random weights, reduced size.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared", help="folder with data/ and pretrained/")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/fidelity.md")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if not (args.data / "data").is_dir() or not (args.data / "pretrained").is_dir():
        sys.exit(f"{args.data} has no data/ and pretrained/; say where they are with --data")
    versions = "\n".join(f"- {name} {version(name)}" for name in PACKAGES)
    precision = "in float32" if args.device == "cpu" else "in half precision"
    page = Page([INTRODUCTION.format(versions=versions, device=args.device, precision=precision)])
    photos = sorted((ROOT / "samples").glob("*.jpg"))
    with local_pipeline(device=args.device) as pipeline:
        classification(page, pipeline, args.data)
        detection(page, pipeline, args.data)
        segmentation(page, pipeline, args.data, photos)
        translation(page, pipeline, args.data, photos)
    fidelity_darknet.compare(page, args.data)
    fidelity_smp_timm.compare(page, args.data, photos)
    fidelity_torchvision.compare(page)
    if find_spec("ultralytics"):  # AGPL-3.0: whoever makes this page decides
        import_module("fidelity_ultralytics").compare(page, photos)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(page.lines) + "\n" + ORACLES)
    print(f"wrote {args.output}")
    if page.missed:
        sys.exit("below what is required:\n" + "\n".join(page.missed))


if __name__ == "__main__":
    main()
