"""Typed clients of the service, for programs that wait and for event loops."""

from vision_service.client.aio import AsyncVisionClient
from vision_service.client.sync import VisionClient

__all__ = ["AsyncVisionClient", "VisionClient"]
