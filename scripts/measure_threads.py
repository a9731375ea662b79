"""What the thread budget costs and gains: the pipeline in process with several numbers of decode workers and threads.

Each setting runs in a process of its own, in turns, so that a machine that slows down slows down all of them. Prints a
table for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, resolve_specs
from vision_service.engine.threads import usable_cores


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Images a second of all models together, and CPU time an image, with one setting."""
    settings = ServerSettings.read(
        models=tuple(args.model),
        runtime=args.runtime,
        precision=args.precision,
        decode_workers=args.decode_workers,
        runtime_threads=args.runtime_threads,
    )
    specs = resolve_specs(settings)
    images = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.is_file()]
    with build_pipeline(settings, specs) as pipeline:
        for spec in specs:
            pipeline.catalog.load(spec)
        free = threading.Semaphore(args.in_flight)
        failed: list[BaseException] = []

        def done(future: Future[Any]) -> None:
            if error := future.exception():
                failed.append(error)
            free.release()

        def run(seconds: float) -> tuple[int, float, float]:
            sent, started_s, cpu_s = 0, time.monotonic(), time.process_time()
            while time.monotonic() - started_s < seconds:
                free.acquire()
                spec = specs[sent % len(specs)]
                pipeline.submit(images[sent % len(images)], task=spec.task, model=spec.name).add_done_callback(done)
                sent += 1
            for _ in range(args.in_flight):
                free.acquire()
            result = sent, time.monotonic() - started_s, time.process_time() - cpu_s
            for _ in range(args.in_flight):
                free.release()
            return result

        run(1.0)
        sent, wall_s, cpu_s = run(args.seconds)
    if failed:
        raise SystemExit(f"{len(failed)} images failed, the first with: {failed[0]}")
    return {"images_s": sent / wall_s, "core_ms": 1000 * cpu_s / sent, "cores_busy": cpu_s / wall_s}


def main() -> None:
    """Measure all settings in turns and print the table."""
    cores = usable_cores()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("samples"))
    parser.add_argument("--model", nargs="+", default=["mobilenet_v2"])
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    default = [(0, 0), (1, cores), (cores, 1), (4 * cores, cores), (cores, 4 * cores), (4 * cores, 4 * cores)]
    parser.add_argument("--settings", nargs="+", default=[f"{workers},{threads}" for workers, threads in default])
    parser.add_argument("--decode-workers", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--runtime-threads", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode_workers >= 0:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in args.settings}
    for _ in range(args.rounds):
        for setting in args.settings:
            workers, threads = setting.split(",")
            chosen = ["--decode-workers", workers, "--runtime-threads", threads]
            command = [sys.executable, __file__, *sys.argv[1:], *chosen]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[setting].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{' + '.join(args.model)}, {args.runtime} {args.precision}, {args.in_flight} in flight, {cores} cores\n")
    print("| decode workers | runtime threads | images/s | core-ms an image | cores busy |")
    print("|---|---|---|---|---|")
    for setting, runs in found.items():
        row = [statistics.median(run[key] for run in runs) for key in ("images_s", "core_ms", "cores_busy")]
        names = ["default" if part == "0" else part for part in setting.split(",")]
        print(f"| {names[0]} | {names[1]} | {row[0]:.1f} | {row[1]:.2f} | {row[2]:.2f} |")


if __name__ == "__main__":
    main()
