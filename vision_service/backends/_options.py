"""Reading a spec's ``options``: defaults filled in, anything unknown refused."""

from __future__ import annotations

from typing import Any

from vision_service.config import ModelSpec
from vision_service.errors import ConfigError, choices


def read_options(spec: ModelSpec, defaults: dict[str, Any]) -> dict[str, Any]:
    """A backend's options.

    Args:
        spec: whose options to read.
        defaults: every option that the backend knows; a value must be of its default's type.

    Returns:
        Every option, as chosen or else the default.

    Raises:
        ConfigError: an option is unknown (near matches are named) or of the wrong type.
    """
    for name, value in spec.options.items():
        where = f"model {spec.name!r}: option {name!r}"
        if name not in defaults:
            raise ConfigError(f"{where} is unknown to backend {spec.backend!r}; {choices(name, defaults)}")
        wanted = type(defaults[name])
        if type(value) is not wanted:
            raise ConfigError(f"{where} must be {wanted.__name__}, got {value!r}")
    return defaults | spec.options
