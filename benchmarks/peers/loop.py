"""A bare loop without any server: while the network runs a batch, threads prepare the next one."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from network import arguments, network, preparation
from photos import read_jpegs

ARGS = arguments()


def main() -> None:
    """Read ``FOLDER SECONDS`` from each line of stdin; print images a second."""
    run, prepare = network(ARGS.model, ARGS.runtime, ARGS.precision, ARGS.threads), preparation(ARGS.runtime)
    with ThreadPoolExecutor(2) as pool:
        print("ready", flush=True)
        for line in sys.stdin:
            folder, seconds = line.rsplit(maxsplit=1)
            images = read_jpegs(Path(folder))
            print(json.dumps({"images_per_s": _speed(images, float(seconds), run, prepare, pool)}), flush=True)


def _speed(images, seconds, run, prepare, pool):
    def begin(start):
        return [pool.submit(prepare, images[(start + i) % len(images)]) for i in range(ARGS.batch)]

    for batch in (ARGS.batch, 0):  # the first one is not counted
        done, waiting, started_s = 0, begin(0), time.perf_counter()
        until_s = started_s + (1.0 if batch else seconds)
        while time.perf_counter() < until_s:
            ready = [future.result() for future in waiting]
            waiting = begin(done)
            run(ready)
            done += len(ready)
        speed = done / (time.perf_counter() - started_s)
    return speed


if __name__ == "__main__":
    main()
