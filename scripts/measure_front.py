"""What one process can take in: CPU time of a served call by thread, with a network that costs next to nothing.

The event loop's share is serial: its reciprocal is the most calls a second that one process can answer, however many
cores it has. Load comes from a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from vision_service.client import AsyncVisionClient
from vision_service.engine.threads import limit_spinning

MANIFEST = """[[model]]
name = "lenet"
task = "classify"
backend = "lenet5"
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
device = "cpu"
runtime = "torch"
batching.max_batch_size = 16
preprocess.resize = { mode = "stretch", size_hw = [32, 32] }
"""


def send(port: int, images: list[bytes], calls: int, in_flight: int) -> None:
    """Make so many calls."""

    async def run() -> None:
        async with AsyncVisionClient(f"127.0.0.1:{port}") as vision:
            numbers = iter(range(calls))

            async def client() -> None:
                for number in numbers:
                    await vision.classify(images[number % len(images)])

            await asyncio.gather(*(client() for _ in range(in_flight)))

    asyncio.run(run())


def thread_cpu_s() -> Counter[str]:
    """CPU seconds of this process's threads so far, by what they do; ``native``: those that Python did not start."""
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    used: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        name = names.get(int(task.name), "native")
        role = next((role for role in ("decode", "-run", "-finish", "event loop") if role in name), "others")
        with suppress(FileNotFoundError):  # it has ended
            used["native" if name == "native" else role] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return used


def main() -> None:
    """Measure and print a table."""
    limit_spinning()  # as `serve` does; it has no effect once torch is there, which these import
    from vision_service.config.settings import ServerSettings
    from vision_service.server.app import VisionServer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("samples"))
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=32)
    args = parser.parse_args()
    images = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.toml"
        manifest.write_text(MANIFEST)
        settings = ServerSettings.read(models=("lenet",), manifests=(manifest,), host="127.0.0.1", port=0)
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="event loop", daemon=True).start()

        async def start() -> VisionServer:
            server = VisionServer(settings)
            await server.start()
            return server

        server = asyncio.run_coroutine_threadsafe(start(), loop).result()
        for calls in (200, args.calls):
            client = multiprocessing.get_context("spawn").Process(
                target=send, args=(server.port, images, calls, args.in_flight)
            )
            before, started_s = thread_cpu_s(), time.monotonic()
            client.start()
            client.join()
            used = thread_cpu_s() - before
            wall_s = time.monotonic() - started_s
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
    print(f"{args.calls} calls, {sum(map(len, images)) / len(images) / 1000:.0f} kB an image\n")
    print("| thread | CPU ms a call |")
    print("|---|---|")
    for role, seconds in used.most_common():
        print(f"| {role} | {1000 * seconds / args.calls:.3f} |")
    print(f"| all | {1000 * used.total() / args.calls:.3f} |")
    print(f"\n{args.calls / wall_s:.0f} calls/s with the client's start; ", end="")
    print(f"the event loop alone allows {args.calls / used['event loop']:.0f} calls/s")


if __name__ == "__main__":
    main()
