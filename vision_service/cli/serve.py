"""`vision-service serve`: the gRPC server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vision_service.cli import options

if TYPE_CHECKING:
    from vision_service.config.settings import ServerSettings
    from vision_service.server.app import VisionServer


def serve(
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).", dir_okay=False)] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to serve; repeat for several.")] = None,
    manifest: Annotated[list[Path] | None, typer.Option(help="Manifest of further models; repeatable.")] = None,
    trust: Annotated[
        list[str] | None, typer.Option(help="Model whose weight file may run code when it is loaded; repeatable.")
    ] = None,
    offline: Annotated[
        bool | None, typer.Option("--offline/--online", help="Never fetch missing weights over the network.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    runtime: options.Runtime = None,
    precision: options.Precision = None,
    calibration_folder: options.CalibrationFolder = None,
    transport: Annotated[
        str | None, typer.Option(help="What takes calls: asyncio, or gRPC's own server, grpcio.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    engine: options.Engine = "local",
    ray_address: options.RayAddress = None,
    min_replicas: Annotated[int | None, typer.Option(help="ray: at least so many replicas; 1.")] = None,
    max_replicas: Annotated[int | None, typer.Option(help="ray: at most so many replicas; 4.")] = None,
    replica_cpus: Annotated[float | None, typer.Option(help="ray: cores of a replica; 1.")] = None,
    replica_gpus: Annotated[float | None, typer.Option(help="ray: GPUs of a replica, or a share of one; 0.")] = None,
) -> None:
    """Serve models over gRPC until SIGTERM or Ctrl-C, then drain.

    Flags win over the environment (VISION_SERVICE_PORT=...), that over the file. Missing weights are fetched first,
    which is told on stderr. Ready when "ready on" is printed.
    """
    import asyncio
    import os

    from vision_service.cli.progress import Downloads
    from vision_service.config.settings import ServerSettings
    from vision_service.engine.build import pull_missing, resolve_specs
    from vision_service.server.logs import set_up_logs

    flags: dict[str, Any] = {
        "host": host,
        "port": port,
        "models": tuple(model) if model else None,
        "manifests": tuple(manifest) if manifest else None,
        "trusted_models": tuple(trust) if trust else None,
        "offline": offline,
        "device": device,
        "runtime": runtime,
        "precision": precision,
        "calibration_folder": calibration_folder,
        "transport": transport,
        "log_level": log_level.upper() if log_level else None,
        "log_format": log_format,
    }
    settings = ServerSettings.read(config, **{name: value for name, value in flags.items() if value is not None})
    set_up_logs(settings.log_level, settings.log_format)
    ray = {
        "ray_address": ray_address,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "cpus": replica_cpus,
        "gpus": replica_gpus,
    }
    options.check_engine(engine, ray)
    _print_settings(settings)
    if engine == "ray":
        raise typer.Exit(_serve_on_ray(settings, ray))
    with Downloads() as watcher:
        pull_missing(resolve_specs(settings), settings, watcher)
    if settings.grpc_experiments and settings.transport == "grpcio":
        os.environ.setdefault("GRPC_EXPERIMENTS", settings.grpc_experiments)
    from vision_service.server.app import serve as run  # with gRPC, which reads the variable when it is imported

    raise typer.Exit(asyncio.run(run(settings, on_ready=_print_ready)))


def _print_settings(settings: ServerSettings) -> None:
    typer.echo("effective settings:")
    for name, value in settings.model_dump(mode="json").items():
        typer.echo(f"  {name} = {value}")


def _print_ready(server: VisionServer) -> None:
    names = ", ".join(host.label for host in server.pipeline.catalog.hosts())
    typer.echo(f"ready on {server.settings.host}:{server.port} with {names}")
    import sys

    sys.stdout.flush()


def _serve_on_ray(settings: ServerSettings, chosen: dict[str, Any]) -> int:
    from vision_service.server import ray_serve

    address = chosen.pop("ray_address") or ""
    given = {name: value for name, value in chosen.items() if value is not None}
    models = ", ".join(settings.models)
    return ray_serve.serve(
        settings,
        ray_serve.replica_options(settings, given),
        address,
        on_ready=lambda port: typer.echo(f"ready on port {port} of each Ray node with {models}"),
    )
