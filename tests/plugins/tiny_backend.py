"""A third party's backends, as small as they get: found by their entry points, so the tests use the real mechanism.

The network answers with the image's mean red value, so whoever sent an image knows which answer is its own.
Option `gate`: the forward pass waits until the file of that name exists, and says so by a file
`NAME.entered`. Option `fail_red`: an image of that red
value makes the network raise; `oom_red`, likewise, as if memory ran out. `sleep_s` is what a forward pass takes,
`sleep_each_s` what each of its images takes besides. `SEEN` counts the images that reached a
network, by red value.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vision_service.backends.base import Backend
from vision_service.types import Classification, Task, TranslatedImage

SEEN: Counter[int] = Counter()
BATCHES: list[int] = []


class TinyNetwork(nn.Module):
    def __init__(self, gate: str, fail_red: int, oom_red: int, sleep_s: float, sleep_each_s: float) -> None:
        super().__init__()
        self.gate, self.fail_red, self.oom_red = gate, fail_red, oom_red
        self.sleep_s, self.sleep_each_s = sleep_s, sleep_each_s
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        reds = (255 * x[:, 0].mean((1, 2)) * self.scale).round()
        for red in reds.int().tolist():
            SEEN[red] += 1
        BATCHES.append(len(reds))
        if self.gate:
            Path(f"{self.gate}.entered").touch()
        deadline = time.monotonic() + 30
        while self.gate and not Path(self.gate).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(self.sleep_s + len(reds) * self.sleep_each_s)
        if self.fail_red in reds.int().tolist():
            raise ValueError("this red is not to my taste")
        if self.oom_red in reds.int().tolist():
            raise torch.OutOfMemoryError("told to")
        return reds


class TinyBackend(Backend):
    task = Task.CLASSIFY

    def build_network(self):
        options = self.spec.options
        if options.get("refuse_to_build"):
            raise RuntimeError("told to fail")
        reds = (options.get(name, -1) for name in ("fail_red", "oom_red"))
        times_s = (options.get(name, 0.0) for name in ("sleep_s", "sleep_each_s"))
        return TinyNetwork(options.get("gate", ""), *reds, *times_s)

    def postprocess(self, outputs, metas, params):
        (reds,) = outputs
        if self.spec.options.get("lose_one"):
            reds = reds[1:]
        predictions = []
        for red, _ in zip(reds.tolist(), metas, strict=False):
            class_id = int(red)
            score = float("nan") if class_id == self.spec.options.get("nan_red") else red / 255
            predictions.append(
                Classification(np.array([class_id]), (self.spec.classes[class_id],), np.array([score], np.float32))
            )
        return predictions


class TinyTranslateBackend(Backend):
    """Keeps the image's size and inverts nothing: output is input."""

    task = Task.TRANSLATE

    def build_network(self):
        return nn.Identity()

    def postprocess(self, outputs, metas, params):
        images = (255 * outputs[0]).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [
            TranslatedImage(np.ascontiguousarray(image[: meta.original_hw[0], : meta.original_hw[1]]))
            for image, meta in zip(images, metas, strict=True)
        ]
