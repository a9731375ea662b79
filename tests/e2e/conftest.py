"""Servers that can be stopped and killed."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import PLUGINS, tiny_manifest


@pytest.fixture(scope="module", params=["asyncio", "grpcio"])
def transport(request):
    """Both ways to take calls, for every server of a module that asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISION_SERVICE_TRANSPORT", request.param)
        yield request.param


@pytest.fixture
def serve_process(tmp_path):
    """Starts `vision-service serve` as a process; gives it, its port and what it printed. Its log is in tmp_path."""
    processes = []

    def start(*arguments, **environment):
        command = [sys.executable, "-m", "vision_service", "serve", "--host", "127.0.0.1", "--port", "0", *arguments]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | environment
            )
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


@pytest.fixture
def serve(serve_process, tmp_path):
    """The same of a tiny model, with more lines for its table."""

    def start(more="", *arguments, **environment):
        model = ("--manifest", str(tiny_manifest(tmp_path, tiny=more)), "--model", "tiny", "--log-format", "json")
        return serve_process(*model, *arguments, **{"PYTHONPATH": str(PLUGINS)} | environment)

    return start
