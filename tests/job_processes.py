"""Jobs as processes of their own, so that they can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import PLUGINS, ROOT


def start(*words: object) -> subprocess.Popen:
    """`vision-service` with these words. What it says on stderr can be read."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PLUGINS), str(ROOT)])}
    command = [sys.executable, "-m", "vision_service", *map(str, words)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def lines_in(output: Path) -> int:
    """How many results a job has committed."""
    path = output / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen, output: Path, count: int) -> None:
    """Return once a job has committed so many."""
    deadline_s = time.monotonic() + 100
    while lines_in(output) < count:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline_s, "the job does not get on"
        time.sleep(0.003)


def kill_at_30_60_and_90_percent(output: Path, images: int, *words: object) -> None:
    """Start a job three times over and kill it; it writes a table when it is through, and so none of these does."""
    for percent in (30, 60, 90):
        process = start(*words, "--save", "csv")
        wait_for_lines(process, output, images * percent // 100)
        process.kill()
        process.communicate()
        assert lines_in(output) < images
        assert not (output / "results.csv").exists()
