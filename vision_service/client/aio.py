"""The client for event loops: the methods of `VisionClient`, to be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vision_service.client import codec, replies
from vision_service.client.codec import Classes
from vision_service.client.retry import Polling, RetryPolicy
from vision_service.client.transport import MAX_MESSAGE_BYTES, AsyncTransport, Settings
from vision_service.imaging.source import ColorOrder, ImageInput
from vision_service.model_info import ModelInfo
from vision_service.types import Classification, Detections, Result, SegmentationMap, Task, TranslatedImage
from vision_service.wire import ImageEncoding, MaskEncoding

if TYPE_CHECKING:
    import grpc


class AsyncVisionClient:
    """Calls a server from an event loop; make it inside one. Arguments, answers and errors as in `VisionClient`.

    Calls may run side by side: that is how one program fills the server's batches. Cancelling a call cancels it on
    the server.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 30.0,
        max_attempts: int = 4,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        stream: bool = False,
        hold_back: bool = False,
    ) -> None:
        self.address = address
        policy = RetryPolicy(max_attempts=max_attempts)
        self._transport = AsyncTransport(
            Settings(address, timeout_s, policy, max_message_bytes, credentials, tuple(metadata), stream, hold_back)
        )

    async def classify(
        self,
        image: ImageInput,
        *,
        model: str = "",
        version: str = "",
        top_k: int | None = None,
        score_threshold: float | None = None,
        classes: Classes = None,
        color_order: ColorOrder = "rgb",
        timeout_s: float | None = None,
    ) -> Result[Classification]:
        """See `VisionClient.classify`."""
        build = partial(
            codec.classify_request,
            image,
            model=model,
            version=version,
            top_k=top_k,
            score_threshold=score_threshold,
            classes=classes,
            color_order=color_order,
        )
        return await self._transport.call("Classify", build, replies.read_classification, timeout_s)

    async def detect(
        self,
        image: ImageInput,
        *,
        model: str = "",
        version: str = "",
        score_threshold: float | None = None,
        iou_threshold: float | None = None,
        max_detections: int | None = None,
        classes: Classes = None,
        mask_encoding: MaskEncoding = "coco_rle",
        color_order: ColorOrder = "rgb",
        timeout_s: float | None = None,
    ) -> Result[Detections]:
        """See `VisionClient.detect`."""
        build = partial(
            codec.detect_request,
            image,
            model=model,
            version=version,
            score_threshold=score_threshold,
            iou_threshold=iou_threshold,
            max_detections=max_detections,
            classes=classes,
            mask_encoding=mask_encoding,
            color_order=color_order,
        )
        return await self._transport.call("Detect", build, replies.read_detections, timeout_s)

    async def segment(
        self,
        image: ImageInput,
        *,
        model: str = "",
        version: str = "",
        score_threshold: float | None = None,
        classes: Classes = None,
        mask_encoding: MaskEncoding = "coco_rle",
        color_order: ColorOrder = "rgb",
        timeout_s: float | None = None,
    ) -> Result[SegmentationMap]:
        """See `VisionClient.segment`."""
        build = partial(
            codec.segment_request,
            image,
            model=model,
            version=version,
            score_threshold=score_threshold,
            classes=classes,
            mask_encoding=mask_encoding,
            color_order=color_order,
        )
        return await self._transport.call("Segment", build, replies.read_segments, timeout_s)

    async def translate(
        self,
        image: ImageInput,
        *,
        model: str = "",
        version: str = "",
        image_encoding: ImageEncoding = "png",
        quality: int | None = None,
        color_order: ColorOrder = "rgb",
        timeout_s: float | None = None,
    ) -> Result[TranslatedImage]:
        """See `VisionClient.translate`."""
        build = partial(
            codec.translate_request,
            image,
            model=model,
            version=version,
            image_encoding=image_encoding,
            quality=quality,
            color_order=color_order,
        )
        return await self._transport.call("Translate", build, replies.read_image, timeout_s)

    async def list_models(self, task: Task | None = None, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """See `VisionClient.list_models`."""
        return await self._transport.call(
            "ListModels", partial(codec.list_models_request, task), replies.read_list_models, timeout_s
        )

    async def get_model(self, name: str, version: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """See `VisionClient.get_model`."""
        return await self._transport.call(
            "GetModel", partial(codec.get_model_request, name, version), replies.read_get_model, timeout_s
        )

    async def health(self, service: str = "", *, timeout_s: float = 5.0) -> bool:
        """See `VisionClient.health`."""
        return await self._transport.health(service, timeout_s)

    async def wait_ready(self, timeout_s: float = 60.0, service: str = "") -> None:
        """See `VisionClient.wait_ready`."""
        polling = Polling(self.address, timeout_s)
        while not await self.health(service, timeout_s=polling.question_s()):
            await asyncio.sleep(polling.pause_s())

    async def close(self) -> None:
        """See `VisionClient.close`."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
