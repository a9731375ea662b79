"""The RPCs: read the request, run the pipeline, write the reply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import grpc

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.api.v1 import vision_pb2_grpc as pb_grpc
from vision_service.engine.pipeline import Pipeline
from vision_service.server import codec, replies
from vision_service.server.arrivals import Arrivals
from vision_service.server.streams import PredictStreams
from vision_service.types import Result


class VisionServicer(pb_grpc.VisionServiceServicer):
    """VisionService over a pipeline, without streams.

    Args:
        pipeline: where images go.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._arrivals = Arrivals()

    async def Classify(self, request: pb.ClassifyRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        return await self._predict(codec.read_classify, request, context)

    async def Detect(self, request: pb.DetectRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        return await self._predict(codec.read_detect, request, context)

    async def Segment(self, request: pb.SegmentRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        return await self._predict(codec.read_segment, request, context)

    async def Translate(self, request: pb.TranslateRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        return await self._predict(codec.read_translate, request, context)

    async def _predict(
        self, read: Callable[[Any], codec.Call], request: Any, context: grpc.aio.ServicerContext
    ) -> replies.Response:
        call = read(request)
        form = call.form
        # When the caller hangs up or its deadline passes, gRPC cancels this coroutine, and that the waiting image.
        coming = self._pipeline.submit(
            call.image,
            task=form.task,
            model=call.model.name,
            version=call.model.version,
            overrides=call.overrides,
            timeout_s=context.time_remaining(),
            finish=partial(replies.write_reply, form=form),
            finish_needed=replies.takes_long,
        )
        del call  # it has the image, which is not needed here while the answer is waited for
        answer = await self._arrivals.wait_for(coming)
        return replies.write_reply(answer, form) if isinstance(answer, Result) else answer


class StreamingServicer(VisionServicer):
    """The same with streams.

    Args:
        pipeline: where images go.
        streams: what serves Predict.
    """

    def __init__(self, pipeline: Pipeline, streams: PredictStreams) -> None:
        super().__init__(pipeline)
        self._streams = streams

    async def Predict(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        """See the API."""
        await self._streams.serve(context)


class ModelServicer(pb_grpc.ModelServiceServicer):
    """ModelService over a pipeline's catalog.

    Args:
        pipeline: whose models are shown.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._catalog = pipeline.catalog

    async def ListModels(self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        task = codec.read_list_models(request)
        return replies.write_list_models([self._catalog.info(host) for host in self._catalog.hosts(task)])

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        """See the API."""
        selector = codec.read_get_model(request)
        return replies.write_get_model(self._catalog.info(self._catalog.find(selector.name, selector.version)))
