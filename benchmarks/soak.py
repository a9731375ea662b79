"""Does the server's memory stay flat? 20,000 mixed images, broken ones among them, through one server.

    make soak
    python benchmarks/soak.py [--calls 20000] [--output benchmarks/results/soak.json]

The server runs three models. What is sent: JPEG, PNG, WebP, BMP and TIFF; grey, colour and with alpha; from 33x47 to
1920x1280; and files that are cut off, empty of pixels, or no images at all. Memory is read when nothing is under way;
what counts is its growth after the warm-up, which is the first tenth of the calls.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from vision_service.bench.cpu import cpu_model, memory_mb
from vision_service.bench.http2 import GrpcConnection
from vision_service.bench.load import STATUS_NAMES
from vision_service.bench.plan import Setup, Variant
from vision_service.bench.served import REQUESTS, SERVICE, Target, server
from vision_service.types import Task

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = 0.03
IN_FLIGHT = 24
MODELS = {"mobilenet_v2": Task.CLASSIFY, "nanodet_g": Task.DETECT, "selfie_segmentation": Task.SEGMENT}
SHARES = (8, 1, 1)
"""How many calls of ten each model gets."""
SIZES_HW = ((47, 33), (120, 160), (224, 224), (480, 640), (375, 500), (1000, 700), (1280, 1920))


def main() -> None:
    """Send the images, watch the memory, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--runtime", default="openvino")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    arguments = parser.parse_args()
    photos = [path.read_bytes() for path in sorted((ROOT / "samples").glob("*.jpg"))]
    first, *beside = MODELS
    with server(Setup(), Variant(first, arguments.runtime, arguments.precision), beside) as target:
        found = soak(target, mixed_images(photos), arguments.calls)
    found = {"processor": cpu_model(), "precision": arguments.precision, **found}
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "rss_mb"}, indent=1))
    sys.exit(0 if found["growth"] < ALLOWED else 1)


def soak(target: Target, images: Sequence[bytes], calls: int) -> dict:
    """Send so many images in steps of a fiftieth; after each step nothing is under way and memory is read."""
    step, rng, statuses = max(1, calls // 50), random.Random(0), Counter()  # noqa: S311
    rss_mb, started_s = [memory_mb(target.pid)], time.monotonic()
    connections = {
        model: GrpcConnection(target.address, SERVICE + task.value.capitalize()) for model, task in MODELS.items()
    }
    for sent in range(0, calls, step):
        for model, share in zip(MODELS, SHARES, strict=True):
            count = round(min(step, calls - sent) * share / sum(SHARES))
            messages = [REQUESTS[MODELS[model]](rng.choice(images), model=model) for _ in range(count)]
            statuses += _send(connections[model], [message.SerializeToString() for message in messages])
        rss_mb.append(memory_mb(target.pid))
        print(f"{sum(statuses.values())} calls, {rss_mb[-1]:.0f} MiB", file=sys.stderr)
    warm = len(rss_mb) // 10
    # Medians of a few readings: the allocator gives and takes a little at any moment.
    before, after = median(rss_mb[warm : warm + 5]), median(rss_mb[-5:])
    return {
        "calls": sum(statuses.values()),
        "statuses": dict(statuses),
        "images": len(images),
        "seconds": round(time.monotonic() - started_s, 1),
        "rss_after_warmup_mb": round(before, 1),
        "rss_at_end_mb": round(after, 1),
        "growth": round(after / before - 1, 4),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "rss_mb": [round(value, 1) for value in rss_mb],
    }


def _send(connection: GrpcConnection, messages: Sequence[bytes]) -> Counter:
    """Send messages, so many in flight; returns how they ended."""
    ended: Counter = Counter()
    waiting = [connection.prepare(message) for message in reversed(messages)]
    flying = 0
    while waiting or flying:
        while waiting and flying < IN_FLIGHT:
            connection.start(waiting.pop())
            flying += 1
        connection.flush()
        for reply in connection.replies(30.0):
            ended[STATUS_NAMES.get(reply.status, str(reply.status))] += 1
            flying -= 1
    return ended


def mixed_images(photos: Sequence[bytes]) -> list[bytes]:
    """Files of every format, size and number of channels, and broken ones: about one of eight."""
    rng = np.random.default_rng(0)
    files: list[bytes] = []
    for photo in photos:
        whole = cv2.imdecode(np.frombuffer(photo, np.uint8), cv2.IMREAD_COLOR)
        for height, width in SIZES_HW:
            image = cv2.resize(whole, (width, height))
            alpha = np.dstack([image, rng.integers(0, 255, (height, width), np.uint8)])
            grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            for suffix, pixels in ((".jpg", image), (".jpg", grey), (".webp", image), (".png", alpha), (".png", grey)):
                files.append(cv2.imencode(suffix, pixels)[1].tobytes())
            if height * width < 300_000:
                files += [cv2.imencode(suffix, image)[1].tobytes() for suffix in (".bmp", ".tiff")]
        files += [photo[: len(photo) // 2], photo[:20], b"not an image", rng.bytes(5000)]
        files += [files[-5][:-300], b"\x89PNG\r\n\x1a\n" + rng.bytes(400)]
    return files


if __name__ == "__main__":
    main()
