"""Compare `vision-service evaluate` with pycocotools called by hand, on all of BCCD and voc30.

    python scripts/check_evaluate.py [--data ../shared/data] [--model nanodet_g]

For each split: the report in process and the report through a server, against figures from the raw XML files, calls
by hand and pycocotools, which share no code with the package (`tests/coco_by_hand.py`). Fails when one differs by more
than 1e-6. BCCD's cells are no classes of COCO, so round things are mapped to them: what is checked is the arithmetic.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.coco_by_hand import coco_stats, guesses_of, voc_to_coco  # noqa: E402
from tests.helpers import run_server  # noqa: E402
from vision_service.client import VisionClient  # noqa: E402
from vision_service.config.settings import ServerSettings  # noqa: E402
from vision_service.evaluation.report import Report  # noqa: E402

CELLS = {"sports ball": "RBC", "donut": "RBC", "frisbee": "WBC"}
VOC = {
    **{"airplane": "aeroplane", "motorcycle": "motorbike", "couch": "sofa"},
    **{"potted plant": "pottedplant", "dining table": "diningtable", "tv": "tvmonitor"},
}
TOLERANCE = 1e-6


def by_hand(files: list[Path], images: Path, address: str, model: str, names: dict[str, str]) -> dict:
    """Figures by pycocotools from raw annotations and one call after another."""
    truths = voc_to_coco(files)
    with VisionClient(address) as client:
        found = [
            client.detect(images / f"{file.stem}.jpg", model=model, score_threshold=0.01, max_detections=100).prediction
            for file in files
        ]
    return coco_stats(truths, guesses_of(found, truths, names))[0]


def evaluated(report: Path, model: str, root: Path, *more: str) -> dict:
    """Figures of the command."""
    command = [sys.executable, "-m", "vision_service", "evaluate", model, str(root), "--report", str(report), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return Report.read(report).metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", default="nanodet_g")
    arguments = parser.parse_args()
    data, model = arguments.data, arguments.model
    bccd, voc30 = data / "bccd", data / "voc30"
    sets = [("voc30", voc30, "", sorted((voc30 / "annotations").glob("*.xml")), voc30 / "images", VOC)]
    for split in ("train", "val", "test"):
        stems = (bccd / "ImageSets/Main" / f"{split}.txt").read_text().split()
        files = [bccd / "Annotations" / f"{stem}.xml" for stem in stems]
        sets.append((f"bccd, {split}", bccd, split, files, bccd / "JPEGImages", CELLS))
    settings = ServerSettings.read(host="127.0.0.1", port=0, device="cpu", models=(model,))
    worst = 0.0
    print("| dataset | images | mAP@[.5:.95] | AP50 | largest difference in process | through a server |")
    print("|---|---|---|---|---|---|")
    with run_server(settings) as server, tempfile.TemporaryDirectory() as folder:
        address, report, map_file = f"127.0.0.1:{server.port}", Path(folder) / "r.json", Path(folder) / "cells.toml"
        map_file.write_text("".join(f'"{ours}" = "{theirs}"\n' for ours, theirs in CELLS.items()))
        for name, root, split, files, images, names in sets:
            expected = by_hand(files, images, address, model, names)
            more = ["--split", split, "--map", str(map_file)] if split else []
            differences = []
            for way in ([], ["--address", address, "--concurrency", "1"]):
                figures = evaluated(report, model, root, *more, *way)
                shared = [key for key, value in expected.items() if key in figures and value is not None]
                differences.append(max(abs(figures[key] - expected[key]) for key in shared))
            row = [name, str(len(files)), f"{expected['map']:.6f}", f"{expected['map50']:.6f}"]
            print("|", " | ".join([*row, *(f"{difference:.1e}" for difference in differences)]), "|", flush=True)
            worst = max(worst, *differences)
    if worst > TOLERANCE:
        sys.exit(f"figures differ by {worst:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()
