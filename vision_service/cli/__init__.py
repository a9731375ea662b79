"""The command line. Commands parse, call and print; what is slow to import is imported inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from vision_service import __version__
from vision_service.cli import add, bench, client, evaluate, health, models, predict, serve, weights
from vision_service.cli.failures import readable, show_tracebacks
from vision_service.engine.threads import limit_spinning

COMMANDS: dict[str, Callable[..., Any]] = {
    "serve": serve.serve,
    "predict": predict.predict,
    "client": client.client,
    "evaluate": evaluate.evaluate,
    "health": health.health,
    "bench": bench.bench,
}
"""Commands by name, in the order of ``--help``."""

GROUPS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "models": (
        "Which models there are, and their weights.",
        {
            "list": models.list_models,
            "show": models.show,
            "pull": weights.pull,
            "verify": weights.verify,
            "add": add.add,
        },
    ),
}
"""Groups of commands: what they are about, and the commands."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vision-service {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Photos in; classes, boxes, masks and images out."""
    show_tracebacks(debug)
    limit_spinning()


for _name, _command in COMMANDS.items():
    app.command(_name)(readable(_command))
for _name, (_about, _commands) in GROUPS.items():
    _group = typer.Typer(no_args_is_help=True, help=_about)
    for _subname, _command in _commands.items():
        _group.command(_subname)(readable(_command))
    app.add_typer(_group, name=_name)
