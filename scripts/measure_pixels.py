"""What the way of a pixel costs: CPU milliseconds an image of decoding, resizing and putting batches together."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from vision_service.engine.staging import Staging
from vision_service.imaging.decode import decode_for, decode_image
from vision_service.imaging.preprocess import preprocess, stack
from vision_service.weights.manifest import find_model


def cpu_ms(work: Callable[[], Any], count: int = 1, rounds: int = 7) -> float:
    """CPU milliseconds of this thread, the best of some rounds, divided by a count."""
    work()
    best = float("inf")
    for _ in range(rounds):
        started_s = time.thread_time()
        work()
        best = min(best, time.thread_time() - started_s)
    return 1000 * best / count


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, default=Path("samples"))
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    spec = find_model("mobilenet_v2").preprocess
    files = [path.read_bytes() for path in sorted(args.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    images = [decode_image(file) for file in files]
    inputs = [preprocess(image, spec)[0] for image in images][:16]
    staging = Staging(pinned=False)
    print(
        f"{len(files)} files, {sum(map(len, files)) / len(files) / 1000:.0f} kB each\n"
        "\n| step | CPU ms an image |\n|---|---|"
    )
    print(f"| decode | {cpu_ms(lambda: [decode_image(file) for file in files], len(files)):.3f} |")
    print(f"| resize and crop | {cpu_ms(lambda: [preprocess(image, spec) for image in images], len(files)):.3f} |")
    for name, work in (("the reused buffer", lambda: staging.stack(inputs)), ("new memory", lambda: stack(inputs))):
        often = cpu_ms(lambda w=work: [w() for _ in range(50)], 50 * len(inputs))
        print(f"| batch of {len(inputs)} into {name} | {often:.4f} |")
    print("\n| JPEG | whole | scaled | peak of pixels, whole and scaled |\n|---|---|---|---|")
    photo = images[0]
    exact = spec.model_copy(update={"exact_decode": True})
    for width, height in ((1600, 1200), (2048, 1536), (4032, 3024)):
        pixels = cv2.resize(photo, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        pixels += np.random.default_rng(0).integers(-6, 7, pixels.shape, np.int16)  # a photo has noise
        large = np.clip(pixels, 0, 255).astype(np.uint8)
        file = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        times, sizes = [], []
        for chosen in (exact, spec):
            image = decode_for(file, chosen)[0]
            sizes.append(f"{image.nbytes / 1e6:.1f}")

            def prepare(chosen: Any = chosen, file: bytes = file) -> Any:
                image, original_hw = decode_for(file, chosen)
                return preprocess(image, chosen, original_hw)

            times.append(f"{cpu_ms(prepare):.1f} ms")
        print(
            f"| {width} x {height}, {len(file) / 1e6:.1f} MB | {times[0]} | {times[1]} | {sizes[0]} MB, {sizes[1]} MB |"
        )


if __name__ == "__main__":
    main()
