"""A connection to Ray, or a Ray of one machine that ends with the program."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vision_service.errors import ConfigError

OWN_OBJECT_STORE_BYTES = 512 * 1024 * 1024
"""Of a Ray that is started here. What passes through it are images under way, whose number is bounded."""


def load_ray() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    # Read when Ray is imported or started. Nothing of this project reports its use to anybody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"Ray cannot be used: {error}; pip install 'vision-service[ray]'") from None
    return ray


@contextmanager
def connected(address: str = "", *, show_logs: bool = False) -> Iterator[Any]:
    """Ray, connected; on the way out it is left as it was found.

    Args:
        address: ``HOST:PORT`` of a cluster, or ``auto`` for the one that runs on this machine; empty: one of this
            machine alone that is started here and ends here.
        show_logs: print what tasks and actors print; else it is in Ray's own log files alone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    ray = load_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=show_logs)
        else:
            if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
                # Ray would write a token into the home directory, which may not be writable.
                os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OWN_OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
                log_to_driver=show_logs,
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"no Ray cluster answers at {address!r}" if address else "Ray cannot be started here"
        raise ConfigError(f"{where}: {error}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
