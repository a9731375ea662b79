"""The API behind Ray Serve's proxy: a real cluster of one node, a real channel, a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.helpers import PLUGINS, red_image, tiny_manifest, until
from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.client import VisionClient
from vision_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    QueueFull,
)

pytestmark = pytest.mark.timeout(300)  # several processes import torch, which takes long where other work is done


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    gate = tmp_path_factory.mktemp("gate") / "open"
    gate.touch()
    return gate


@pytest.fixture(scope="module")
def port(tmp_path_factory, gate):
    folder = tmp_path_factory.mktemp("models")
    manifest = tiny_manifest(
        folder,
        tiny="options.fail_red = 13",
        gated=f'options.gate = "{gate}"\nbatching = {{max_batch_size = 1, max_queued_jobs = 1}}',
    )
    command = [sys.executable, "-m", "vision_service", "serve", "--engine", "ray", "--port", "0", "--device", "cpu"]
    command += ["--manifest", str(manifest), "--model", "tiny", "--model", "gated", "--max-replicas", "1"]
    environment = os.environ | {"PYTHONPATH": str(PLUGINS), "HOME": str(folder), "RAY_TMPDIR": str(folder)}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        with process:
            ready = next((line for line in process.stdout if line.startswith("ready on port ")), None)
            assert ready, (folder / "log").read_text()
            yield int(ready.split()[3])
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    assert not (folder / ".ray").exists()


@pytest.fixture
def client(port):
    with VisionClient(f"127.0.0.1:{port}", timeout_s=20, max_attempts=1) as opened:
        yield opened


def test_answers_are_the_servers_own(client):
    result = client.classify(red_image(77))
    assert result.prediction.class_names == ("red 77",)
    assert (result.model_name, result.original_hw) == ("tiny", (16, 24))
    assert {info.name for info in client.list_models()} == {"tiny", "gated"}
    assert client.get_model("gated").name == "gated"


def test_errors_have_their_status_and_request_id(client, port):
    with pytest.raises(InvalidImage, match="not an image"):
        client.classify(b"no picture")
    with pytest.raises(ModelNotFound, match="did you mean 'tiny'"):
        client.classify(red_image(1), model="tinny")
    with pytest.raises(InvalidInput) as caught:
        client.classify(red_image(1), score_threshold=3.0)
    assert caught.value.field == "score_threshold"
    with pytest.raises(InferenceFailed) as failed:
        client.classify(red_image(13))
    assert failed.value.request_id


def test_health_by_the_standard_protocol(client):
    assert client.health()
    assert client.health("classify")
    assert not client.health("detect")
    with pytest.raises(ModelNotFound):
        client.health("nonsense")


def test_a_deadline_that_passes_frees_the_place_in_the_queue(client, gate):
    gate.unlink(missing_ok=True)
    entered = gate.with_name(f"{gate.name}.entered")
    entered.unlink(missing_ok=True)

    def classify(red, timeout_s):
        return client.classify(red_image(red), model="gated", timeout_s=timeout_s).prediction.class_names[0]

    with ThreadPoolExecutor() as callers:
        try:
            running = callers.submit(classify, 1, 20)
            until(entered.exists, "the first image never reached the network")
            three = [callers.submit(classify, red, 3) for red in (2, 3, 4)]  # one may wait, and there is no third place
            errors = sorted((one.exception() for one in three), key=lambda error: type(error).__name__)
            assert [type(error) for error in errors] == [DeadlineExceeded, QueueFull, QueueFull]
            assert errors[1].retry_after_s > 0
            assert errors[1].request_id
            last = callers.submit(classify, 5, 20)
            time.sleep(0.3)
            assert not last.done(), last.exception()  # it was let in: the expired call gave its place back
        finally:
            gate.touch()
        assert (running.result(), last.result()) == ("red 1", "red 5")


def test_there_are_no_streams(port):
    """Serve's proxy cannot pass them on; a client that asks for one makes calls instead."""
    request = pb.PredictRequest(items=[pb.PredictItem(id=1)])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answers = pb_grpc.VisionServiceStub(channel).Predict(iter([request]), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "make a call for each image" in caught.value.details()
