"""What the thread budget gains: the pipeline in process with several numbers of decode workers and runtime threads.

A number of runtime threads is compiled into a model, so each has a process of its own; the numbers of decode workers
take turns in it, round after round. Prints a table for docs/performance.md.
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
from vision_service.engine.pipeline import Pipeline
from vision_service.engine.threads import usable_cores


def measure(pipeline: Pipeline, images: list[bytes], in_flight: int, seconds: float) -> tuple[float, float, float]:
    """Images a second of all models together, CPU milliseconds an image, cores busy."""
    hosts = pipeline.catalog.hosts()
    free = threading.Semaphore(in_flight)
    failed: list[BaseException] = []

    def done(future: Future[Any]) -> None:
        if error := future.exception():
            failed.append(error)
        free.release()

    sent, started_s, cpu_s = 0, time.monotonic(), time.process_time()
    while time.monotonic() - started_s < seconds:
        free.acquire()
        spec = hosts[sent % len(hosts)].spec
        pipeline.submit(images[sent % len(images)], task=spec.task, model=spec.name).add_done_callback(done)
        sent += 1
    for _ in range(in_flight):
        free.acquire()
    wall_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    if failed:
        raise SystemExit(f"{len(failed)} images failed, the first with: {failed[0]}")
    return sent / wall_s, 1000 * cpu_s / sent, cpu_s / wall_s


def measure_workers(args: argparse.Namespace) -> dict[str, list[tuple[float, float, float]]]:
    """What `measure` finds for each number of decode workers, with one number of runtime threads."""
    settings = ServerSettings.read(
        models=tuple(args.model),
        runtime=args.runtime,
        precision=args.precision,
        runtime_threads=args.runtime_threads,
    )
    specs = resolve_specs(settings)
    images = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.is_file()]
    found: dict[str, list[tuple[float, float, float]]] = {}
    with build_pipeline(settings, specs) as first:
        for spec in specs:
            first.catalog.load(spec)
        pipelines = {str(workers): Pipeline(first.catalog, decode_workers=workers) for workers in args.workers}
        for number in range(args.rounds + 1):
            for name, pipeline in pipelines.items():
                figures = measure(pipeline, images, args.in_flight, args.seconds)
                if number > 0:  # the first round warms up
                    found.setdefault(name, []).append(figures)
    return found


def main() -> None:
    """Measure all settings and print the table."""
    cores = usable_cores()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("samples"))
    parser.add_argument("--model", nargs="+", default=["mobilenet_v2"])
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, cores, 4 * cores])
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, cores, 4 * cores], help="0: as planned")
    parser.add_argument("--runtime-threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.runtime_threads is not None:
        print(json.dumps(measure_workers(args)))
        return
    print(f"{' + '.join(args.model)}, {args.runtime} {args.precision}, {args.in_flight} in flight, {cores} cores\n")
    print("| runtime threads | decode workers | images/s | core-ms an image | cores busy |")
    print("|---|---|---|---|---|")
    for threads in args.threads:
        command = [sys.executable, __file__, *sys.argv[1:], "--runtime-threads", str(threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for workers, rounds in json.loads(done.stdout.splitlines()[-1]).items():
            rate, core_ms, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"| {threads or 'as planned'} | {workers} | {rate:.1f} | {core_ms:.2f} | {busy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
