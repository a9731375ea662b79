"""Logs as lines for people or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time

FIELDS = ("method", "status", "request_id", "peer", "duration_ms", "calls")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, and a call's fields where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line for people; a call's fields at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The message with the call's fields."""
        line = super().formatMessage(record)
        fields = [f"{name}={value}" for name in FIELDS[2:] if (value := getattr(record, name, None)) is not None]
        return f"{line}  {' '.join(fields)}" if fields else line


def set_up_logs(level: str, log_format: str) -> None:
    """Send this process's log to stderr.

    Args:
        level: least severe level that is logged.
        log_format: ``json`` or ``text``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
