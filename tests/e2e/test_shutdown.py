"""`vision-service serve` as a process: starts, says so, and drains on SIGTERM."""

import os
import re
import signal
import subprocess
import sys
import time

import grpc
import pytest

from tests.e2e.test_server import raw_request
from tests.helpers import PLUGINS, tiny_manifest
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc


@pytest.fixture
def serve(tmp_path):
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


def test_sigterm_answers_what_is_in_flight_and_refuses_what_is_new(serve, tmp_path):
    process, port, printed = serve("options = {sleep_s = 0.15}\nbatching = {max_batch_size = 4}")
    assert "effective settings:" in printed
    assert "ready on 127.0.0.1" in printed
    assert "tiny:1" in printed
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        vision = pb_grpc.VisionServiceStub(channel)
        vision.Classify(raw_request(200), timeout=10)
        calls = [vision.Classify.future(raw_request(red), timeout=30) for red in range(32)]
        while not any(call.done() for call in calls):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert not all(call.done() for call in calls)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as late, pytest.raises(grpc.RpcError) as caught:
            pb_grpc.VisionServiceStub(late).Classify(raw_request(99), timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        names = [call.result().classes[0].class_name for call in calls]
    assert names == [f"red {red}" for red in range(32)]
    assert process.wait(20) == 0
    log = (tmp_path / "log").read_text()
    assert '"message": "stopped"' in log
    assert "Traceback" not in log


def test_settings_come_from_the_environment_too(serve):
    _, _, printed = serve("", VISION_SERVICE_MAX_IMAGE_PIXELS="1234")
    assert "max_image_pixels = 1234" in printed


def test_a_wrong_setting_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "vision_service", "serve", "--port", "0", "--model", "nanodet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no model 'nanodet' is known; did you mean 'nanodet_g'?" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
