"""CPU time of an image in each runtime and precision, on one thread, for docs/runtimes.md.

    python scripts/measure_runtimes.py [--model NAME]... [--calibrate FOLDER]

Processor time, not time on the clock: what else runs on the machine changes it little. On one thread nothing waits for
another thread, and waiting would count. The runtimes take turns, round after round; shown are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from vision_service.backends.table import create_backend
from vision_service.runtimes import Calibration, Execution, Forward, Workload, create_runtime
from vision_service.weights.manifest import find_model

ROOT = Path(__file__).resolve().parent.parent
CHOICES = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("onnxruntime", "fp32"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
BATCH = 8


def compiled(model: str, runtime: str, precision: str, photos: Path) -> tuple[Forward, torch.Tensor, torch.Tensor]:
    """A network, and a batch for it."""
    spec = find_model(model)
    calibration = Calibration(photos, spec.preprocess)
    pairs = (calibration.batches() * BATCH)[:BATCH]
    images, sizes_hw = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    work = Workload(images[:1], BATCH, described="measured", calibration=calibration)
    network = create_backend(spec).build()
    forward = create_runtime(runtime, torch.device("cpu"), Execution(1)).compile(network, work, precision)
    return forward, images, sizes_hw


def cpu_ms(forward: Forward, images: torch.Tensor, sizes_hw: torch.Tensor) -> float:
    """Milliseconds of processor time an image, the whole process."""
    started_s = time.process_time()
    forward(images, sizes_hw)
    return 1000 * (time.process_time() - started_s) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="repeatable [mobilenet_v2, nanodet_g]")
    parser.add_argument("--calibrate", type=Path, default=ROOT / "samples", help="folder for int8")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| model | runtime | precision | CPU ms an image, batch of {BATCH} | against eager fp32 |")
    print("|---|---|---|---|---|")
    for model in args.model or ["mobilenet_v2", "nanodet_g"]:
        ready = {choice: compiled(model, *choice, args.calibrate) for choice in CHOICES}
        for run in ready.values():  # the first runs choose kernels and take memory
            cpu_ms(*run)
        rounds = [{choice: cpu_ms(*run) for choice, run in ready.items()} for _ in range(args.rounds)]
        medians = {choice: statistics.median(taken[choice] for taken in rounds) for choice in CHOICES}
        for (runtime, precision), median in medians.items():
            ratio = medians["torch", "fp32"] / median
            print(f"| `{model}` | `{runtime}` | {precision} | {median:.1f} | {ratio:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
