"""Ways to execute a network."""

from vision_service.runtimes.base import Forward, Runtime
from vision_service.runtimes.torch_eager import TorchEager

__all__ = ["Forward", "Runtime", "TorchEager"]
