"""The client for programs that wait for their answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vision_service.client import codec, replies
from vision_service.client.codec import Classes
from vision_service.client.retry import Polling, RetryPolicy
from vision_service.client.transport import MAX_MESSAGE_BYTES, Settings, Transport
from vision_service.imaging.source import ColorOrder, ImageInput
from vision_service.model_info import ModelInfo
from vision_service.types import Classification, Detections, Result, SegmentationMap, Task, TranslatedImage
from vision_service.wire import ImageEncoding, MaskEncoding

if TYPE_CHECKING:
    import grpc


class VisionClient:
    """Calls a server. Threads may share one; close it, or use it in a ``with``.

    An image is a path, the bytes of a file, or a uint8 array ``[H, W]``, ``[H, W, 3]`` or ``[H, W, 4]`` in RGB
    order (``color_order="bgr"`` for OpenCV's). Predictions are in pixels of that image.

    Errors are the classes of `vision_service.errors` that the server raised, its message unchanged, the
    ``grpc.RpcError`` as their cause; ``request_id`` and ``address`` are attributes of them. A full queue and a server
    that is away are tried again within the deadline, see `RetryPolicy`. On a stream, a request that failed by itself
    has no ``grpc.RpcError``; a prediction that was held back was not sent, has neither that nor a request id, and its
    message is the client's.

    Args:
        address: ``host:port``.
        timeout_s: for a whole call, all attempts and pauses included, seconds.
        max_attempts: calls in all, the first included.
        max_message_bytes: largest request or reply.
        credentials: for TLS; ``None`` speaks plain text.
        metadata: sent with every call; when predictions travel on a stream, once with that.
        stream: whether predictions travel as requests on one stream instead of a call each. For many images, and for
            the frames of a video, when many are under way at one time, from threads or tasks: a request on a stream
            costs client and server less than a call (``vision-service bench`` measures it). Answers, errors, deadlines
            and retries stay the same. In return, images are sent one after the other, so that a small one waits for a
            large one before it; a proxy that balances by calls sends all of them to one server; and when the stream
            breaks, all that is under way is sent again. Where a server has no streams, and for a request that a stream
            cannot take, the client makes calls.
        hold_back: whether predictions by a method and a model's name and version are held back once the server had no
            room for one, until the time that it named, 10 s at most. Until then they are not sent, which is an attempt
            like one that the server refused: they fail or are tried again. That spares a full server its refusals, each
            of which costs it a part of an image (``vision-service bench --overload`` measures it). In return, all of a
            model's requests fail for a moment where some would have found room. For clients of one server: behind a
            proxy that balances by calls another one may have room.

    Raises:
        InvalidInput: ``max_attempts`` is below 1.
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
        self._transport = Transport(
            Settings(address, timeout_s, policy, max_message_bytes, credentials, tuple(metadata), stream, hold_back)
        )

    def classify(
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
        """What is in an image: the likeliest classes.

        Args:
            image: see the class.
            model: its name; empty: the server's default.
            version: of that model; empty: the newest that is ready.
            top_k: at most so many classes, 1 or more.
            score_threshold: lowest score, 0..1.
            classes: names and ids to keep; ``None`` keeps all.
            color_order: of an array.
            timeout_s: instead of the client's.

        Returns:
            Highest score first.

        Raises:
            VisionError: see the class.
        """
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
        return self._transport.call("Classify", build, replies.read_classification, timeout_s)

    def detect(
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
        """Where things are in an image.

        Args:
            image: see the class.
            model: its name; empty: the server's default.
            version: of that model; empty: the newest that is ready.
            score_threshold: lowest score, 0..1.
            iou_threshold: overlap above which the lower-scored box of the same class is dropped, 0..1.
            max_detections: at most so many boxes, 1 or more.
            classes: names and ids to keep; ``None`` keeps all.
            mask_encoding: how masks travel, if the model makes them; ``polygon`` is not exact.
            color_order: of an array.
            timeout_s: instead of the client's.

        Returns:
            Boxes in pixels of the image, highest score first, with a mask each if the model makes them.

        Raises:
            VisionError: see the class.
        """
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
        return self._transport.call("Detect", build, replies.read_detections, timeout_s)

    def segment(
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
        """Which pixels of an image belong to what.

        Args:
            image: see the class.
            model: its name; empty: the server's default.
            version: of that model; empty: the newest that is ready.
            score_threshold: lowest score that makes a pixel foreground, 0..1.
            classes: names and ids to keep; ``None`` keeps all.
            mask_encoding: how masks travel; ``polygon`` is not exact.
            color_order: of an array.
            timeout_s: instead of the client's.

        Returns:
            A class map of the image's size. Pixels of no class are `VOID`; the class table has the names of the
            classes that were found, the others are empty: a reply does not carry them, `get_model` does.

        Raises:
            VisionError: see the class.
        """
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
        return self._transport.call("Segment", build, replies.read_segments, timeout_s)

    def translate(
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
        """An image made from an image.

        Args:
            image: see the class.
            model: its name; empty: the server's default.
            version: of that model; empty: the newest that is ready.
            image_encoding: how the output travels; ``raw`` costs bytes, ``png`` time, the others detail.
            quality: of JPEG and WebP, 1..100.
            color_order: of an array that is sent.
            timeout_s: instead of the client's.

        Returns:
            RGB, whatever the order of what was sent.

        Raises:
            VisionError: see the class.
        """
        build = partial(
            codec.translate_request,
            image,
            model=model,
            version=version,
            image_encoding=image_encoding,
            quality=quality,
            color_order=color_order,
        )
        return self._transport.call("Translate", build, replies.read_image, timeout_s)

    def list_models(self, task: Task | None = None, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Every model of a task, or of all; without class tables.

        Raises:
            VisionError: see the class.
        """
        return self._transport.call(
            "ListModels", partial(codec.list_models_request, task), replies.read_list_models, timeout_s
        )

    def get_model(self, name: str, version: str = "", *, timeout_s: float | None = None) -> ModelInfo:
        """One model, class table included.

        Raises:
            ModelNotFound: lists what exists.
            VisionError: see the class.
        """
        return self._transport.call(
            "GetModel", partial(codec.get_model_request, name, version), replies.read_get_model, timeout_s
        )

    def health(self, service: str = "", *, timeout_s: float = 5.0) -> bool:
        """Whether the server answers calls. Never retried.

        Args:
            service: as the server names it; empty: the server as a whole.
            timeout_s: a server that takes longer is not healthy.

        Returns:
            False while it starts, drains, or cannot be reached.

        Raises:
            VisionError: the server does not know the service, or has no health checks.
        """
        return self._transport.health(service, timeout_s)

    def wait_ready(self, timeout_s: float = 60.0, service: str = "") -> None:
        """Return once `health` says yes.

        Raises:
            DeadlineExceeded: it did not, in time.
            VisionError: as `health`.
        """
        polling = Polling(self.address, timeout_s)
        while not self.health(service, timeout_s=polling.question_s()):
            time.sleep(polling.pause_s())

    def close(self) -> None:
        """Close the channel; calls under way fail."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
