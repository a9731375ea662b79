"""A job over 1,000 images on a Ray of two nodes, one of which is killed in the middle, beside the same job without Ray.

    make ray-two-nodes               # on ../shared/data and samples/
    python scripts/ray_two_nodes.py --images 200 --model mobilenet_v2

Both nodes, the driver and the models share this machine's cores, so the rates say what Ray costs and not what more
machines bring.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.batch_rate import make_folder  # noqa: E402
from tests.ray_cluster import TwoNodes, two_nodes  # noqa: E402


def command(photos: Path, output: Path, model: str, *more: str) -> list[str]:
    job = [sys.executable, "-m", "vision_service", "predict", str(photos), "--model", model, "--device", "cpu"]
    return [*job, "--output", str(output), *more]


def parts_in(output: Path) -> int:
    return len(list(output.glob("parts/*.parquet")))


def on_ray(nodes: TwoNodes, photos: Path, output: Path, model: str, kill_after_parts: int) -> float:
    """Seconds that the job took; a node is killed when so many parts are written, or none for 0."""
    began_s = time.perf_counter()
    line = command(photos, output, model, "--engine", "ray", "--ray-address", nodes.address)
    with subprocess.Popen(line, env=nodes.environment, stderr=subprocess.DEVNULL) as job:
        while kill_after_parts and parts_in(output) < kill_after_parts and job.poll() is None:
            time.sleep(0.1)
        if kill_after_parts:
            print(f"killing a node after {parts_in(output)} parts", flush=True)
            nodes.kill(nodes.worker)
        job.wait()
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--model", default="nanodet_g")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
        photos, alone, ray = (Path(folder) / name for name in ("photos", "alone", "ray"))
        photos.mkdir()
        make_folder(photos, chosen.images - 1)
        (photos / "broken.jpg").write_bytes(b"not an image")
        took_s = on_ray(nodes, photos, ray, chosen.model, kill_after_parts=max(1, 32 * 3 // 10))
        print(f"on Ray, one of two nodes killed: {chosen.images / took_s:.1f} images/s, start included", flush=True)
        nodes.close()
        began_s = time.perf_counter()
        subprocess.run(command(photos, alone, chosen.model), env=os.environ, stdout=subprocess.DEVNULL, check=False)
        print(f"without Ray: {chosen.images / (time.perf_counter() - began_s):.1f} images/s, start included")
        for name in ("results.jsonl", "failures.jsonl"):
            here, there = ((place / name).read_bytes() for place in (alone, ray))
            equal = "equal to the byte" if here == there else "equal when sorted"
            if sorted(here.splitlines()) != sorted(there.splitlines()):
                equal = "DIFFERENT"
            print(f"{name}: {len(here.splitlines())} lines, {equal}")
        print(f"parts: {parts_in(ray)}")


if __name__ == "__main__":
    main()
