"""The same gRPC API behind Ray Serve: its proxy listens, replicas on any node of a cluster answer.

A replica is a pipeline with every model, and the servicers and the interceptor that the server has, so requests are
read, answered and refused by the same code. `build` is the application for ``serve run`` and KubeRay, `serve` runs it
until SIGTERM.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vision_service.api.v1 import vision_pb2 as pb
from vision_service.cluster import connected, load_ray
from vision_service.config.settings import ServerSettings
from vision_service.engine.build import build_pipeline, pull_missing, resolve_specs
from vision_service.engine.garbage import settle_garbage
from vision_service.errors import ConfigError, InvalidInput
from vision_service.server.access import AccessLog
from vision_service.server.calls import observed
from vision_service.server.logs import set_up_logs
from vision_service.server.servicers import ModelServicer, VisionServicer
from vision_service.types import Task

logger = logging.getLogger(__name__)

APPLICATION = "vision-service"

SERVICERS = [
    "vision_service.api.v1.vision_pb2_grpc.add_VisionServiceServicer_to_server",
    "vision_service.api.v1.vision_pb2_grpc.add_ModelServiceServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
"""What Serve's proxy is told to offer (``grpc_servicer_functions``)."""

NO_STREAMS = "there are no streams behind Ray Serve; make a call for each image"

_EMPTY_REPLIES = {
    "Classify": pb.ClassifyResponse,
    "Detect": pb.DetectResponse,
    "Segment": pb.SegmentResponse,
    "Translate": pb.TranslateResponse,
    "ListModels": pb.ListModelsResponse,
    "GetModel": pb.GetModelResponse,
    "Check": health_pb2.HealthCheckResponse,
}


class ReplicaOptions(BaseModel):
    """How many replicas there are, and how large.

    Attributes:
        settings: fields of `ServerSettings` for every replica, such as ``models``; the replica's environment gives the
            others.
        min_replicas: at least so many.
        max_replicas: at most so many.
        cpus: of a replica: what Ray sets aside for it, and how many threads it decodes and computes with.
        gpus: of a replica; a share of one is allowed.
        target_calls: calls under way per replica that the number of replicas is chosen for.
        max_calls: most calls under way in a replica; further ones wait in Serve's router.
        max_waiting: most calls that wait in a router; one more is RESOURCE_EXHAUSTED.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: dict[str, Any] = {}
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    target_calls: float = Field(default=16.0, gt=0)
    max_calls: int = Field(default=64, ge=1)
    max_waiting: int = Field(default=256, ge=1)


class VisionReplica:
    """One replica: models loaded once, then calls. Serve runs its methods on an event loop.

    Args:
        settings: fields of `ServerSettings`.
        cores: how many threads decode and compute where the settings leave that open.

    Raises:
        VisionError: a model could not be loaded; Serve then reports the deployment as unhealthy.
    """

    def __init__(self, settings: dict[str, Any], cores: int) -> None:
        threads = {"decode_workers": cores, "runtime_threads": cores, "forward_passes": 1}
        self._settings = ServerSettings.read(**threads | settings)
        set_up_logs(self._settings.log_level, self._settings.log_format)
        specs = resolve_specs(self._settings)
        pull_missing(specs, self._settings)
        self._pipeline = build_pipeline(self._settings, specs)
        for spec in specs:
            self._pipeline.catalog.load(spec)
        settle_garbage()
        self._access = AccessLog()
        self._vision = VisionServicer(self._pipeline)
        self._models = ModelServicer(self._pipeline)

    async def Classify(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("Classify", self._vision.Classify, request, grpc_context, self._access)

    async def Detect(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("Detect", self._vision.Detect, request, grpc_context, self._access)

    async def Segment(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("Segment", self._vision.Segment, request, grpc_context, self._access)

    async def Translate(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("Translate", self._vision.Translate, request, grpc_context, self._access)

    async def Predict(self, requests: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Not here: a proxy spreads calls over replicas, and a stream would stay with one. Clients make calls then."""
        grpc_context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        grpc_context.set_details(NO_STREAMS)
        raise NotImplementedError(NO_STREAMS)  # Serve keeps the code of a call that raises
        yield  # so that this is a generator, as Serve wants methods of streams to be

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("ListModels", self._models.ListModels, request, grpc_context, self._access)

    async def GetModel(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """See the API."""
        return await _answer("GetModel", self._models.GetModel, request, grpc_context, self._access)

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        """The standard health protocol, answered by a replica: whoever gets an answer can have calls answered."""
        return await _answer("Check", self._check, request, grpc_context, self._access)

    async def _check(self, request: Any, context: Any) -> Any:
        if request.service in set(Task):
            ready = self._pipeline.catalog.ready(Task(request.service))
        elif request.service in ("", *(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())):
            ready = True
        else:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if ready else status.NOT_SERVING)

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        if not all(self._pipeline.catalog.ready(host.spec.task) for host in self._pipeline.catalog.hosts()):
            raise RuntimeError("a model does not answer")

    def __del__(self) -> None:
        """Called by Serve once the replica has drained."""
        pipeline = getattr(self, "_pipeline", None)
        if pipeline is not None:
            pipeline.close(self._settings.drain_timeout_s)
            self._access.write_rest()


class _Context:
    """What servicers and interceptor use of gRPC's context, over what Serve's proxy sends along with a call."""

    def __init__(self, sent: Any) -> None:
        self._sent = sent

    def invocation_metadata(self) -> Any:
        return self._sent.invocation_metadata()

    def peer(self) -> str:
        return str(self._sent.peer())

    def code(self) -> Any:
        return self._sent.code()

    def time_remaining(self) -> None:
        """The proxy keeps the deadline: when it passes, the call here is cancelled and its image with it."""

    def set_trailing_metadata(self, metadata: Any) -> None:
        self._sent.set_trailing_metadata(list(metadata))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self._sent.set_code(code)
        self._sent.set_details(details)
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        raise grpc.aio.AbortError(details)


async def _answer(name: str, servicer: Callable[[Any, Any], Any], request: Any, sent: Any, access: AccessLog) -> Any:
    """Run a servicer's method as the server's interceptor does.

    What was aborted ends with an empty reply, which the proxy does not send: an exception would lose the trailing
    metadata on its way there, and with it the request id and when to come back.
    """
    try:
        return await observed(servicer, request, _Context(sent), name, access)
    except grpc.aio.AbortError:
        return _EMPTY_REPLIES[name]()


def replica_options(settings: ServerSettings, chosen: dict[str, Any]) -> ReplicaOptions:
    """The options of replicas that serve what a process was told to.

    Args:
        settings: of the process; what was set by flag, environment or file goes to the replicas.
        chosen: other fields of `ReplicaOptions`.

    Raises:
        ConfigError: a field is out of its range.
    """
    own = settings.model_dump(mode="json", exclude_unset=True, exclude={"host", "port"})
    try:
        return ReplicaOptions(settings=own, **chosen)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"the options for replicas are wrong: {problems}") from None


def build(args: ReplicaOptions) -> Any:
    """The application: import path ``vision_service.server.ray_serve:build`` for ``serve run`` and KubeRay.

    Args:
        args: how many replicas, and how large.

    Returns:
        A Serve ``Application``.

    Raises:
        ConfigError: Ray is not installed, or a setting is wrong.
    """
    load_ray()
    from ray import serve as ray_serve

    if args.max_replicas < args.min_replicas:
        raise ConfigError(f"max_replicas is {args.max_replicas}, below min_replicas, which is {args.min_replicas}")
    settings = ServerSettings.read(**args.settings)  # what is wrong shows here, not in a replica far away
    deployment = ray_serve.deployment(VisionReplica).options(
        name="VisionReplica",
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_calls,
        },
        max_ongoing_requests=args.max_calls,
        max_queued_requests=args.max_waiting,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    return deployment.bind(args.settings, max(1, round(args.cpus)))


def serve(settings: ServerSettings, options: ReplicaOptions, address: str, on_ready: Callable[[int], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        settings: of the process; the port is the proxy's.
        options: of the replicas.
        address: of the cluster, as in `cluster.connected`.
        on_ready: called with the port once a replica is ready.

    Returns:
        The exit code.

    Raises:
        ConfigError: Ray is not there, or no replica came up.
        InvalidInput: a setting that Serve's proxy cannot honour.
    """
    if settings.host != ServerSettings.model_fields["host"].default:
        raise InvalidInput("host", "has no effect here: Serve's proxy listens on every address of its node")
    stop = threading.Event()
    port = settings.port or _free_port()
    with connected(address, show_logs=True):
        from ray import serve as ray_serve

        for number in (signal.SIGTERM, signal.SIGINT):  # after Ray, which sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        ray_serve.start(
            http_options={"host": "127.0.0.1", "port": _free_port()},
            grpc_options={"port": port, "grpc_servicer_functions": SERVICERS},
        )
        try:
            ray_serve.run(build(options), name=APPLICATION, route_prefix="/")
            on_ready(port)
            stop.wait()
        except RuntimeError as error:
            raise ConfigError(f"no replica came up: {error}") from None
        finally:
            ray_serve.shutdown()
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
