"""Starts a server, sends samples/ through every task over gRPC, and stops it.

Prints what was found and where the time went, and writes annotated pictures. Exits with 1 if any task fails or misses
what is plainly in the photo.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cv2
from rich.console import Console
from rich.table import Table

from vision_service.cli.output import to_line
from vision_service.client import VisionClient
from vision_service.errors import VisionError
from vision_service.imaging.decode import DecodeLimits, decode_image
from vision_service.imaging.draw import annotate
from vision_service.types import Classification, Detections, SegmentationMap, Task, TranslatedImage

ROOT = Path(__file__).resolve().parent.parent
PERSON = 1  # class id of the person segmentation model


def sees(name):
    """A check: one of the classes found is (or ends with) a name."""
    return lambda found: any(other == name or other.endswith(f" {name}") for other in found.class_names)


def has_person(found):
    return found.areas()[PERSON] > found.class_map.size / 5


def is_twice_as_large(found):
    return min(found.image.shape[:2]) >= 600


EXPECTED = {
    ("astronaut", Task.DETECT): ("a person", sees("person")),
    ("chelsea", Task.DETECT): ("a cat", sees("cat")),
    ("coffee", Task.DETECT): ("a cup", sees("cup")),
    ("chelsea", Task.CLASSIFY): ("a cat", sees("cat")),
    ("coffee", Task.CLASSIFY): ("an espresso", sees("espresso")),
    ("astronaut", Task.SEGMENT): ("a person", has_person),
    ("astronaut", Task.TRANSLATE): ("twice the size", is_twice_as_large),
    ("chelsea", Task.TRANSLATE): ("twice the size", is_twice_as_large),
    ("coffee", Task.TRANSLATE): ("twice the size", is_twice_as_large),
}
"""What is plainly in the photos; what no one could miss is not left to luck."""

TYPES = {
    Task.CLASSIFY: Classification,
    Task.DETECT: Detections,
    Task.SEGMENT: SegmentationMap,
    Task.TRANSLATE: TranslatedImage,
}


@contextmanager
def server(console: Console) -> Iterator[int]:
    """A server process on a free port; yields the port, and fails if it does not stop cleanly."""
    command = [sys.executable, "-m", "vision_service", "serve", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen([*command, "--log-level", "WARNING"], stdout=subprocess.PIPE, text=True)
    started_s = time.monotonic()
    try:
        port = next((int(m[1]) for line in process.stdout if (m := re.match(r"ready on .*?:(\d+) ", line))), None)
        if port is None:
            sys.exit(f"the server ended with exit code {process.wait()} before it was ready")
        console.print(f"server ready on port {port} after {time.monotonic() - started_s:.1f} s")
        yield port
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            sys.exit(f"the server ended with exit code {process.returncode}")
        console.print("server stopped")
    finally:
        process.kill()
        process.wait()


def check(name: str, task: Task, result) -> str:
    """What is wrong with a result; empty when nothing is."""
    if not isinstance(result.prediction, TYPES[task]):
        return f"is a {type(result.prediction).__name__}"
    what, found = EXPECTED.get((name, task), ("", lambda _: True))
    return "" if found(result.prediction) else f"{what} was expected"


def row(name: str, task: Task, result, problem: str) -> list[str]:
    t = result.timings
    times = [t.decode_ms, t.preprocess_ms, t.queue_ms, t.forward_ms, t.postprocess_ms, t.encode_ms]
    found = to_line(result) + (f"  [red]{problem}[/red]" if problem else "")
    return [name, str(task), result.model_name, found, *(f"{ms:.1f}" for ms in times), str(t.batch_size)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    photos = sorted((ROOT / "samples").glob("*.jpg"))
    console = Console(width=160)
    table = Table("photo", "task", "model", "found", "decode", "prep.", "queue", "forward", "post.", "encode", "batch")
    problems = [] if photos else ["samples/ has no photos"]

    with server(console) as port, VisionClient(f"127.0.0.1:{port}") as client, ThreadPoolExecutor() as threads:
        calls = {Task.CLASSIFY: client.classify, Task.DETECT: client.detect, Task.SEGMENT: client.segment}
        calls[Task.TRANSLATE] = client.translate
        for task, call in calls.items():
            flying = {photo: threads.submit(call, photo) for photo in photos}  # together, as many clients would
            for photo, future in flying.items():
                try:
                    result = future.result()
                except VisionError as error:
                    problems.append(f"{photo.stem}, {task}: {error}")
                    continue
                problem = check(photo.stem, task, result)
                if problem:
                    problems.append(f"{photo.stem}, {task}: {problem}")
                table.add_row(*row(photo.stem, task, result, problem))
                picture = annotate(decode_image(photo.read_bytes(), DecodeLimits()), result.prediction)
                cv2.imwrite(str(output / f"{photo.stem}_{task}.png"), picture[..., ::-1])

    console.print(table)
    console.print("times in milliseconds, measured on the server; forward and post. are those of the whole batch")
    console.print(f"annotated pictures are in {output}/")
    for problem in problems:
        console.print(f"[red]FAILED[/red] {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
