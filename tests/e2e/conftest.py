"""Servers that can be stopped and killed."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import PLUGINS, tiny_manifest


@pytest.fixture
def serve(tmp_path):
    """Starts servers as processes of their own, each with a tiny model; gives process, port and what it printed."""
    processes = []

    def start(more="", *arguments, **environment):
        manifest = tiny_manifest(tmp_path, tiny=more)
        command = [sys.executable, "-m", "vision_service", "serve", "--host", "127.0.0.1", "--port", "0"]
        command += ["--manifest", str(manifest), "--model", "tiny", "--log-format", "json", *arguments]
        environment = os.environ | {"PYTHONPATH": str(PLUGINS)} | environment
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        processes.append(process)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if found := re.match(r"ready on 127\.0\.0\.1:(\d+)", line):
                return process, int(found[1]), "".join(printed)
        pytest.fail("".join(printed) + (tmp_path / "log").read_text())
        return None

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
