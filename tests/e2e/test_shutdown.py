"""`vision-service serve` as a process: starts, says so, and drains on SIGTERM."""

import os
import signal
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.test_server import raw_request
from tests.helpers import PLUGINS, tiny_manifest
from tests.unit import test_http2 as http2
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc


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


def test_calls_that_are_not_answered_within_the_drain_timeout_show_in_the_exit_code(serve, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    process, port, _ = serve(f'options = {{gate = "{gate}"}}', VISION_SERVICE_DRAIN_TIMEOUT_S="0.5")
    gate.unlink()
    entered = tmp_path / "gate.entered"
    entered.unlink()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = pb_grpc.VisionServiceStub(channel).Classify.future(raw_request(1), timeout=30)
        while not entered.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        gate.touch()
    assert process.wait(20) == 1
    assert '"message": "stopped with calls unanswered"' in (tmp_path / "log").read_text()


def test_an_open_health_watch_does_not_hold_up_the_end(serve):
    process, port, _ = serve("")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.wait(20) == 0
        assert time.monotonic() - started < 15  # and not the drain timeout of 30 s


def test_an_answer_that_is_taken_in_slowly_is_waited_for(serve):
    process, port, _ = serve("")
    fields = [*http2.FIELDS[:2], (":path", "/vision.v1.VisionService/Classify"), *http2.FIELDS[3:]]
    message = raw_request(7).SerializeToString()
    with http2.Raw(port, greet=False) as client:
        client.send(http2.PREFACE, http2.f(http2.SETTINGS, 0, 0, http2.setting(4, 5)))
        client.send(http2.call(1, message, fields))
        body = client.next(http2.hf.DataFrame).data
        process.send_signal(signal.SIGTERM)
        began_s = time.monotonic()
        while len(body) < 5 or len(body) < 5 + int.from_bytes(body[1:5]):
            time.sleep(0.1)
            client.send(http2.f(http2.WINDOW, 0, 1, http2.u32(5)))
            body += client.next(http2.hf.DataFrame).data
        assert client.next(http2.hf.HeadersFrame) is not None
        assert time.monotonic() - began_s > 1.0  # it was waited for longer than others are
    assert pb.ClassifyResponse.FromString(body[5:]).classes[0].class_name == "red 7"
    assert process.wait(20) == 0


def test_a_signal_while_loading_ends_without_serving(tmp_path):
    gate = tmp_path / "gate"
    manifest = tiny_manifest(tmp_path, tiny=f'options = {{gate = "{gate}"}}')
    command = [sys.executable, "-m", "vision_service", "serve", "--port", "0", "--manifest", str(manifest)]
    environment = os.environ | {"PYTHONPATH": str(PLUGINS)}
    with subprocess.Popen(
        [*command, "--model", "tiny"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while "log_format" not in process.stdout.readline():
            pass
        while not (tmp_path / "gate.entered").exists():  # the warm-up, which waits for the gate
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        gate.touch()
        output, log = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "ready on" not in output
        assert log.splitlines()[-1].endswith("stopped")


@pytest.mark.parametrize(
    ("environment", "unknown"),
    [
        ({}, None),  # the default is one that the installed gRPC knows
        ({"VISION_SERVICE_TRANSPORT": "asyncio", "VISION_SERVICE_GRPC_EXPERIMENTS": "no_such_a"}, None),
        ({"VISION_SERVICE_GRPC_EXPERIMENTS": "no_such_a"}, "no_such_a"),
        ({"VISION_SERVICE_GRPC_EXPERIMENTS": "no_such_a", "GRPC_EXPERIMENTS": "no_such_b"}, "no_such_b"),
    ],
)
def test_grpc_is_told_what_the_settings_say_unless_the_environment_does(serve, tmp_path, environment, unknown):
    """gRPC itself is the witness: it names experiments that it does not know, and goes on."""
    _, port, _ = serve("", **{"VISION_SERVICE_TRANSPORT": "grpcio"} | environment)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply = pb_grpc.VisionServiceStub(channel).Classify(raw_request(7), timeout=10)
    assert reply.classes[0].class_name == "red 7"
    named = [line.split()[-1] for line in (tmp_path / "log").read_text().splitlines() if "Unknown experiment" in line]
    assert named == ([unknown] if unknown else [])


def test_settings_come_from_the_environment_too(serve):
    _, _, printed = serve("", VISION_SERVICE_MAX_IMAGE_PIXELS="1234")
    assert "max_image_pixels = 1234" in printed


def test_a_wrong_setting_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "vision_service", "serve", "--port", "0", "--model", "nanodet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no model 'nanodet' is known; did you mean 'nanodet_g'?" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_health_watch_that_takes_nothing_in_does_not_hold_up_the_end(serve):
    """The library's servicer holds what all news have to pass while it writes."""
    process, port, _ = serve()
    fields = [*http2.FIELDS[:2], (":path", "/grpc.health.v1.Health/Watch"), *http2.FIELDS[3:]]
    with http2.Raw(port, greet=False) as client:
        client.send(http2.PREFACE, http2.f(http2.SETTINGS, 0, 0, http2.setting(4, 0)))  # not a byte of content
        client.send(http2.call(1, b"", fields))
        assert client.next(http2.hf.HeadersFrame) is not None
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert process.returncode == 0
