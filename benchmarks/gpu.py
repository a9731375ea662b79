"""ResNet-50 in half precision on a GPU: network alone, pipeline and served, and what limits it.

    make bench-gpu
    python benchmarks/gpu.py [--seconds 5] [--rounds 3]

It has never been run: there was no GPU yet. What it says limits the server follows from the figures: when one core's
time an image, times the speed of the network alone, is more than the cores there are, the processor does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vision_service.bench.report import ModelReport, Report

ROOT = Path(__file__).resolve().parent.parent
IN_FLIGHT = 256


def main() -> None:
    """Measure, print, and write benchmarks/results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default=str(ROOT / "samples"))
    parser.add_argument("--seconds", default="5")
    parser.add_argument("--rounds", default="3")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here; `make bench` measures the processor")
    output = ROOT / "benchmarks" / "results" / "gpu.json"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "service.toml"
        config.write_text("[model.resnet50.batching]\nmax_batch_size = 64\nmax_queued_jobs = 512\n")
        command = [sys.executable, "-m", "vision_service", "bench", "--model", "resnet50", "--device", "cuda:0"]
        command += ["--manifest", str(ROOT / "benchmarks" / "models.toml"), "--config", str(config)]
        command += ["--precision", "fp16", "--in-flight", str(IN_FLIGHT), "--generators", "4", "--json", str(output)]
        command += ["--images", arguments.images, "--seconds", arguments.seconds, "--rounds", arguments.rounds]
        subprocess.run(command, check=True)
    report = Report.read(output)
    print(torch.cuda.get_device_name(0))
    print(limit(report.models[0], report.machine["cores"]))


def limit(model: ModelReport, cores: int) -> str:
    """How much of the network's own speed is served, and why no more."""
    assert model.network_best_per_s, "it was measured"
    assert model.served, "it was measured"
    network, through = model.network_best_per_s.median, model.served.images_per_s.median
    needed = network * (model.served.cpu_ms + model.served.generator_cpu_ms) / 1000
    text = f"{through / network:.2f} of the network's own {network:.0f} images/s are served. "
    if needed > cores:
        return (
            text + f"The processor limits it: the network's speed would take {needed:.1f} cores and there are {cores}."
        )
    prepare = sum(model.stages_cpu_ms.get(name, 0.0) for name in ("decode", "preprocess")) * network / 1000
    return text + (
        f"Not the cores: {needed:.1f} of {cores} would do ({prepare:.1f} of them decoding); "
        "then it is one process's lock, or batches that are not full: see the histogram."
    )


if __name__ == "__main__":
    main()
