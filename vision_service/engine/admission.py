"""How much may be decoding, or waiting to be, at one time."""

from __future__ import annotations

import threading

from vision_service.errors import QueueFull


class Admission:
    """Counts what is decoding or waiting to be, and refuses what is too much.

    Args:
        max_jobs: most images.
        max_bytes: most bytes; a single image is always let in.
    """

    def __init__(self, max_jobs: int, max_bytes: int) -> None:
        self.max_jobs = max_jobs
        self._max_bytes = max_bytes
        self._jobs = 0
        self._bytes = 0
        self._lock = threading.Lock()

    def enter(self, nbytes: int) -> None:
        """Count one in.

        Raises:
            QueueFull: there is no room.
        """
        with self._lock:
            self._check(nbytes)
            self._jobs += 1
            self._bytes += nbytes

    def check(self) -> None:
        """Whether an image, however small, would be counted in now.

        Raises:
            QueueFull: there is no room.
        """
        with self._lock:
            self._check(0)

    def _check(self, nbytes: int) -> None:
        if self._jobs >= self.max_jobs or (self._jobs and self._bytes + nbytes > self._max_bytes):
            raise QueueFull(
                f"{self._jobs} images with {self._bytes} bytes wait to be decoded and the limits are "
                f"{self.max_jobs} and {self._max_bytes}; call again in 0.05 s",
                retry_after_s=0.05,
            )

    def leave(self, nbytes: int) -> None:
        """Count one out."""
        with self._lock:
            self._jobs -= 1
            self._bytes -= nbytes
