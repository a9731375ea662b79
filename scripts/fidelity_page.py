"""What the sections of docs/fidelity.md are made of. `fidelity.py` lists the sections and writes the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Page:
    """The lines of one section, and what missed its mark."""

    lines: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    def table(self, *header: str) -> None:
        """Start a table."""
        print("\n" + " | ".join(header), flush=True)
        self.lines += ["", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]

    def row(self, *cells: str, ok: bool = True) -> None:
        """Add a row; a figure that is not good enough makes the command fail."""
        print(" | ".join(cells), "" if ok else "  <-- MISSED", flush=True)
        self.lines.append(f"| {' | '.join(cells)} |")
        if not ok:
            self.missed.append(" | ".join(cells))


@dataclass(frozen=True)
class Run:
    """What a section is given.

    Attributes:
        shared: the folder with ``data/``, ``pretrained/`` and ``testweights/``.
        photos: the samples that ship, as files.
        device: where ours runs.
        short: take some minutes for all sections together: fewer networks, never fewer checks of those.
    """

    shared: Path
    photos: list[Path]
    device: str = "cpu"
    short: bool = False

    def some(self, every: tuple[T, ...], short: tuple[T, ...]) -> tuple[T, ...]:
        """What to compare: all, or those of the short version."""
        return short if self.short else every


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: one word, for ``--only``.
        compare: writes the tables.
        against: what each was compared with and what is required, a list item in Markdown.
        short: what of it the short version covers; empty: nothing.
        needs: a package that has to be installed for it; empty: none but what the extra ``fidelity`` brings.
    """

    name: str
    compare: Callable[[Page, Run], None]
    against: str
    short: str = ""
    needs: str = ""
