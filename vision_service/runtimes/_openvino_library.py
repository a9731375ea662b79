"""OpenVINO and NNCF, imported on use and without their telemetry."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from vision_service.errors import ConfigError

_TELEMETRY = "openvino_telemetry"


def load_library(name: str, extra: str) -> Any:
    """A module of OpenVINO or NNCF.

    Importing OpenVINO reports to Google Analytics unless the package `openvino_telemetry` cannot be imported, for which
    both have a stub. A service that sees people's photos reports nothing.

    Args:
        name: of the module.
        extra: of this project, that brings it.

    Raises:
        ConfigError: it is not installed; says how to.
    """
    hidden = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # makes an import fail
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: pip install 'vision-service[{extra}]' ({error})") from None
    finally:
        del sys.modules[_TELEMETRY]
        if hidden is not None:
            sys.modules[_TELEMETRY] = hidden


@contextmanager
def logs_as_they_are() -> Iterator[None]:
    """What OpenVINO's converter does to the root logger (its level becomes ERROR) is undone."""
    root = logging.getLogger()
    level, filters, handlers = root.level, root.filters[:], root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.filters, root.handlers = filters, handlers
