"""Tiny models and real servers for tests."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "tests" / "plugins"


def tiny_spec(**fields):
    """A model of the tiny third-party backend; see plugins/tiny_backend.py."""
    from vision_service.config import ModelSpec

    base = {
        "name": "tiny",
        "task": "classify",
        "backend": "tiny",
        "classes": tuple(f"red {i}" for i in range(256)),
        "preprocess": {"resize": {"mode": "stretch", "size_hw": (8, 8)}},
        "device": "cpu",
    }
    return ModelSpec.model_validate(base | fields)


def cpu_has_bf16() -> bool:
    """Whether OpenVINO is installed and computes in bf16 on this processor."""
    if find_spec("openvino") is None:
        return False
    from vision_service.runtimes._openvino_library import load_library

    return "BF16" in load_library("openvino", "openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def until(condition: Callable[[], object], what: str = "it never came to that") -> None:
    """Wait for something that must come, 20 s at most."""
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.005)


def red_image(red: int, height: int = 16, width: int = 24) -> np.ndarray:
    """uint8 [H, W, 3] of one colour, which the tiny network recognises."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = red
    return image


@contextmanager
def run_server(settings, prepare: Callable | None = None) -> Iterator:
    """A real server on a free port, on a thread with an event loop of its own."""
    from vision_service.server.app import VisionServer

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-server", daemon=True)
    thread.start()

    async def make():
        server = VisionServer(settings)
        if prepare is not None:
            prepare(server)
        try:
            await server.start()
        except BaseException:
            await server.stop()
            raise
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(make(), loop).result(120)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def tiny_manifest(folder: Path, **models: str) -> Path:
    """A manifest of tiny models: name -> more TOML lines for its table."""
    classes = "\n".join(f"red {i}" for i in range(256))
    (folder / "reds.txt").write_text(classes + "\n")
    tables = [
        f'[[model]]\nname = "{name}"\ntask = "classify"\nbackend = "tiny"\nclasses = "reds.txt"\ndevice = "cpu"\n'
        f'preprocess.resize = {{mode = "stretch", size_hw = [8, 8]}}\n{more}\n'
        for name, more in models.items()
    ]
    manifest = folder / "manifest.toml"
    manifest.write_text("\n".join(tables))
    return manifest


@contextmanager
def relay(address: str) -> Iterator[tuple[str, list[str]]]:
    """A gRPC server that passes bytes on to another one. Gives its address and the names of the methods called."""
    import grpc

    called: list[str] = []
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(16) as threads:

        class Relay(grpc.GenericRpcHandler):
            def service(self, details):
                called.append(details.method.rpartition("/")[2])
                beyond = channel.stream_stream(details.method)

                def passing(requests, context):
                    try:
                        yield from beyond(requests)
                    except grpc.RpcError as error:
                        context.abort(error.code(), error.details())

                return grpc.stream_stream_rpc_method_handler(passing)

        server = grpc.server(threads, handlers=(Relay(),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}", called
        finally:
            server.stop(None).wait()
