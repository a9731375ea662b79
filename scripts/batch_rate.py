"""How fast `predict` and `client` work through a folder, beside the pipeline that they use, and what memory they need.

    make batch-rate                  # on ../shared/data and samples/, 1000 images
    python scripts/batch_rate.py --images 300 --model mobilenet_v2 --rounds 1

Everything is measured in turn, round after round, with models loaded and warm; the best round counts. The server is a
process of its own on this machine, so that its clients' work is taken from the same cores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from vision_service.client import VisionClient
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, resolve_specs
from vision_service.jobs.job import Job
from vision_service.jobs.journal import Journal
from vision_service.jobs.predictor import Predictor
from vision_service.jobs.served import ServedModel

ROOT = Path(__file__).resolve().parent.parent


def make_folder(folder: Path, count: int) -> None:
    """Links to real photos, so many that each comes several times under names of its own."""
    data = ROOT.parent / "shared" / "data"
    photos = [path for place in (ROOT / "samples", data) for path in sorted(place.rglob("*.jp*g"))]
    for index, photo in enumerate(islice(cycle(photos), count)):
        (folder / f"{index:05d}.jpg").symlink_to(photo)


def memory_mb() -> float:
    """Resident memory of this process, MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000


def run_pipeline(pipeline, spec, photos: list[Path]) -> float:
    """Images a second of the pipeline alone, its answers thrown away."""
    for _ in pipeline.predict_many(photos[:32], task=spec.task, model=spec.name):
        pass
    began_s = time.perf_counter()
    for _ in pipeline.predict_many(photos, task=spec.task, model=spec.name):
        pass
    return len(photos) / (time.perf_counter() - began_s)


def run_job(answers, folder: Path, memory: list[float]) -> tuple[float, bytes]:
    """Images a second of a job with its journal and results, and those; memory at every tenth of it."""
    count = len(list(folder.iterdir()))
    done = 0

    def show(_) -> None:
        nonlocal done
        done += 1
        if done % max(1, count // 10) == 0:
            memory.append(memory_mb())

    with tempfile.TemporaryDirectory() as output, Journal(Path(output), "x") as journal:
        began_s = time.perf_counter()
        summary = Job([str(folder)]).run(answers, journal, show)
        rate = count / (time.perf_counter() - began_s)
        assert (summary.seen, summary.failed) == (count, 0), summary
        return rate, (Path(output) / "results.jsonl").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--model", default="nanodet_g")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=16)
    chosen = parser.parse_args()
    settings = ServerSettings.read(models=(chosen.model,), device="cpu", runtime=chosen.runtime)
    (spec,) = resolve_specs(settings)
    rates: dict[str, list[float]] = {"pipeline": [], "predict": [], "client": []}
    memory: dict[str, list[float]] = {"predict": [], "client": []}
    results = set()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), chosen.images)
        photos = sorted(Path(folder).iterdir())
        for _ in range(chosen.rounds):
            with build_pipeline(settings, [spec]) as pipeline:
                pipeline.catalog.load(spec)
                rates["pipeline"].append(run_pipeline(pipeline, spec, photos))
            with Predictor([spec], settings=settings) as predictor:
                list(predictor.predict_many((path.name, path.read_bytes()) for path in photos[:32]))
                rate, content = run_job(predictor, Path(folder), memory["predict"])
                rates["predict"].append(rate)
                results.add(content)
            with served(chosen) as address, VisionClient(address) as client:
                client.wait_ready(120)
                answers = ServedModel(client, spec.task, model=spec.name, in_flight=chosen.in_flight)
                rate, _ = run_job(answers, Path(folder), memory["client"])
                rates["client"].append(rate)
    best = {name: max(values) for name, values in rates.items()}
    report = {
        "images": chosen.images,
        "model": chosen.model,
        "rates": {name: [round(value, 1) for value in values] for name, values in rates.items()},
        "predict / pipeline": round(best["predict"] / best["pipeline"], 3),
        "client / pipeline": round(best["client"] / best["pipeline"], 3),
        "memory_mb": {name: [round(value) for value in values] for name, values in memory.items()},
        "results of all rounds are equal": len(results) == 1,
    }
    for name, value in report.items():
        print(f"{name}: {json.dumps(value)}")


class served:  # noqa: N801 - reads as the statement it is
    """A server in a process of its own, as a context manager that gives its address."""

    def __init__(self, chosen) -> None:
        words = ("serve", "--host", "127.0.0.1", "--port", "0", "--model", chosen.model, "--device", "cpu")
        self._command = [sys.executable, "-m", "vision_service", *words, "--runtime", chosen.runtime]

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )
        for line in self._process.stdout:
            if found := re.search(r"127\.0\.0\.1:(\d+)", line):
                return found[0]
        raise RuntimeError("the server ended before it listened")

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


if __name__ == "__main__":
    main()
