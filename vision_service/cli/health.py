"""`vision-service health`: one question by the gRPC health protocol, for container engines and scripts."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vision_service.cli.failures import WORK_FAILED

DEFAULT_PORT = "50051"


def health(
    address: Annotated[
        str, typer.Option(help="host:port of the server; else this machine, at VISION_SERVICE_PORT or 50051.")
    ] = "",
    service: Annotated[
        str, typer.Option(help="A task or a service's full name; else the server as a whole, every model ready.")
    ] = "",
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the answer.")] = 2.0,
) -> None:
    """Ask a server whether it answers calls: prints SERVING and exits with 0, or NOT_SERVING and 1."""
    from vision_service.client import VisionClient

    # Not through the settings: a health check runs every few seconds and should cost next to nothing.
    address = address or f"127.0.0.1:{os.environ.get('VISION_SERVICE_PORT', DEFAULT_PORT)}"
    with VisionClient(address) as server:
        serving = server.health(service, timeout_s=timeout)
    typer.echo("SERVING" if serving else "NOT_SERVING")
    if not serving:
        raise typer.Exit(WORK_FAILED)
