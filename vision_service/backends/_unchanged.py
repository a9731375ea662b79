"""A process that stays as it was while something is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
import torch


@contextmanager
def unchanged_process(keep: str) -> Iterator[None]:
    """Undo what a library's import does to others: environment, OpenCV's threads, print options, ``torch.save``.

    Args:
        keep: what the names of variables begin with that may stay in the environment.
    """
    environment, threads, save = dict(os.environ), cv2.getNumThreads(), torch.save
    printed, torch_printed = np.get_printoptions(), vars(torch._tensor_str.PRINT_OPTS).copy()
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            if not name.startswith(keep):
                del os.environ[name]
        cv2.setNumThreads(threads)
        np.set_printoptions(**printed)
        vars(torch._tensor_str.PRINT_OPTS).update(torch_printed)
        torch.save = save
