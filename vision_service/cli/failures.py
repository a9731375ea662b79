"""Errors as one readable line and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import typer

from vision_service.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidInput,
    ModelNotFound,
    ModelUnavailable,
    SetupError,
    VisionError,
)

A = ParamSpec("A")
R = TypeVar("R")

WORK_FAILED = 1
USED_WRONGLY = 2

_show_tracebacks: ContextVar[bool] = ContextVar("show_tracebacks", default=False)


def show_tracebacks(wanted: bool) -> None:
    """Let errors through to the interpreter from now on, or print them as a line."""
    _show_tracebacks.set(wanted)


def readable(command: Callable[A, R]) -> Callable[A, R]:
    """A command whose errors are one line on stderr.

    The exit code is 2 when the command line, a setting or a file that belongs to the setup is wrong, and 1 when the
    work failed.
    """

    @functools.wraps(command)
    def run(*args: A.args, **kwargs: A.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # whoever read our output has had enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            if _show_tracebacks.get():
                raise
            typer.echo(f"error: {_line(error)}", err=True)
            raise typer.Exit(exit_code(error)) from None

    return run


@contextmanager
def asking(address: str) -> Iterator[None]:
    """The first question to a server: when no answer comes, the error says how to see why."""
    try:
        yield
    except (ModelUnavailable, DeadlineExceeded) as error:
        error.add_note(f"`vision-service health --address {address}` tells whether a server answers there")
        raise


def exit_code(error: Exception) -> int:
    """2: used or set up wrongly; 1: the work failed."""
    wrong_use = isinstance(error, (InvalidInput, ModelNotFound, SetupError)) and not isinstance(error, InvalidImage)
    return USED_WRONGLY if wrong_use else WORK_FAILED


def _line(error: Exception) -> str:
    if isinstance(error, VisionError):
        return "; ".join((str(error), *getattr(error, "__notes__", ())))
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return f"unexpected {type(error).__name__}: {error}; `vision-service --debug ...` shows where"
