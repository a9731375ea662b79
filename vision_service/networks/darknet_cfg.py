"""Reading a Darknet ``.cfg``: sections of ``key = value`` lines, in the order in which the layers run.

The grammar is that of ``read_cfg`` in AlexeyAB/darknet ``src/parser.c``: blanks anywhere in a line mean nothing, lines
that begin with ``#`` or ``;`` are comments, sections repeat. Beyond it, a comment may follow a value, and what Darknet
would pass over in silence is an error with its line: text that is no ``key = value``, a key that comes twice with two
values, a number that is none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_SECTION = re.compile(r"\[([^\[\]]+)\]")

TRAINED_ONLY = frozenset(
    {"burnin_update", "clip", "dont_update", "learning_rate", "onlyforward", "stopbackward", "train_only_bn"}
    | {"stream", "wait_stream"}  # how a GPU is scheduled
)
"""Keys that any layer may have and that do not change inference."""

NEUTRAL = {"dontload": 0, "dontloadscales": 0}
"""Keys that any layer may have and that would change how weights are read."""


class DarknetCfgError(ValueError):
    """A ``.cfg`` is wrong, or asks for something that this reader does not do. Says where."""


@dataclass(frozen=True)
class Value:
    """What stands behind a key.

    Attributes:
        text: without blanks and comment.
        line: where, counted from 1.
    """

    text: str
    line: int


@dataclass
class Section:
    """A layer's settings, or the network's.

    Attributes:
        kind: what stands in the brackets.
        index: the layer's number as ``route`` and ``shortcut`` count them, from 0; -1 for ``[net]``.
        line: of the brackets, counted from 1.
        values: by key.
    """

    kind: str
    index: int
    line: int
    values: dict[str, Value] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Such as ``layer 3 [route], line 40``."""
        name = f"layer {self.index} [{self.kind}]" if self.index >= 0 else f"[{self.kind}]"
        return f"{name}, line {self.line}"

    def error(self, problem: str, key: str = "") -> DarknetCfgError:
        """An error of this section; of the key's line if it is given."""
        if key in self.values:
            value = self.values[key]
            return DarknetCfgError(f"{self.where}: line {value.line}, {key}={value.text}: {problem}")
        return DarknetCfgError(f"{self.where}: {problem}")

    def integer(self, key: str, default: int, minimum: int | None = None) -> int:
        """A whole number.

        Raises:
            DarknetCfgError: it is none, or is below ``minimum``.
        """
        found = self._convert(key, int, "a whole number", (default,))
        if len(found) != 1:
            raise self.error(f"need one number, got {len(found)}", key)
        if minimum is not None and found[0] < minimum:
            raise self.error(f"{key} must be {minimum} or more, got {found[0]}", key)
        return found[0]

    def number(self, key: str, default: float) -> float:
        """A number.

        Raises:
            DarknetCfgError: it is none.
        """
        found = self._convert(key, float, "a number", (default,))
        if len(found) != 1:
            raise self.error(f"need one number, got {len(found)}", key)
        return found[0]

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Whole numbers, separated by commas.

        Raises:
            DarknetCfgError: one is none.
        """
        return self._convert(key, int, "a whole number", default)

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Numbers, separated by commas.

        Raises:
            DarknetCfgError: one is none.
        """
        return self._convert(key, float, "a number", default)

    def word(self, key: str, default: str, choices: Iterable[str]) -> str:
        """One of some words.

        Raises:
            DarknetCfgError: it is not among them.
        """
        text = self.values[key].text if key in self.values else default
        if text not in (known := list(choices)):
            raise self.error(f"is not supported; there are: {', '.join(known)}", key)
        return text

    def check_keys(self, used: str, ignored: str = "", neutral: Mapping[str, float | str] | None = None) -> None:
        """Refuse keys that change inference and that the layer does not read.

        Args:
            used: keys that the layer reads, separated by blanks.
            ignored: keys that only training or drawing reads.
            neutral: keys that are not supported, with the one value that changes nothing.

        Raises:
            DarknetCfgError: names the key, its line and near matches.
        """
        quiet = {*used.split(), *ignored.split(), *TRAINED_ONLY}
        for key in self.values:
            if key in quiet:
                continue
            allowed = {**NEUTRAL, **(neutral or {})}
            if key not in allowed:
                near = difflib.get_close_matches(key, sorted(quiet), n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"read here are: {used or 'none'}"
                raise self.error(f"unknown key, which may change what the network computes; {hint}", key)
            if not self._is(key, allowed[key]):
                raise self.error(f"is not supported; only {key}={allowed[key]} is", key)

    def _is(self, key: str, wanted: float | str) -> bool:
        return self.values[key].text == wanted if isinstance(wanted, str) else self.number(key, wanted) == wanted

    def _convert(self, key: str, kind: Callable[[str], T], name: str, default: tuple[T, ...]) -> tuple[T, ...]:
        if key not in self.values:
            return default
        parts = [part for part in self.values[key].text.split(",") if part]  # Darknet's own files end lists with ','
        try:
            return tuple(kind(part) for part in parts)
        except ValueError:
            raise self.error(f"need {name}, or several separated by commas", key) from None


def parse_cfg(text: str) -> list[Section]:
    """The sections of a ``.cfg``: ``[net]``, then a section a layer.

    Args:
        text: the whole file.

    Raises:
        DarknetCfgError: a line is no ``key = value``, a key comes twice, or there is no ``[net]`` with layers after it.
    """
    sections: list[Section] = []
    for number, raw in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        line = "".join(raw.split("#", 1)[0].split())
        if not line or line.startswith(";"):
            continue
        if line.startswith("["):
            if not (match := _SECTION.fullmatch(line)):
                raise DarknetCfgError(f"line {number}: {raw.strip()!r} begins with '[' but is no section")
            sections.append(Section(match[1], len(sections) - 1, number))
            continue
        key, equals, value = line.partition("=")
        if not (key and equals and value):
            raise DarknetCfgError(f"line {number}: {raw.strip()!r} is neither [section] nor key=value nor # comment")
        if not sections:
            raise DarknetCfgError(f"line {number}: {raw.strip()!r} stands before the first [section]")
        _add(sections[-1], key, Value(value, number))
    if not sections or sections[0].kind not in ("net", "network"):
        found = f"[{sections[0].kind}], line {sections[0].line}" if sections else "nothing"
        raise DarknetCfgError(f"the first section must be [net], got {found}: this is not a Darknet cfg")
    if len(sections) == 1:
        raise DarknetCfgError("there is no layer after [net]: the file is cut off")
    return sections


def _add(section: Section, key: str, value: Value) -> None:
    older = section.values.setdefault(key, value)
    if older.text != value.text and section.index >= 0:
        # Darknet takes the first, OpenCV the last. In [net], which is mostly about training, the first will do.
        raise section.error(f"line {value.line} gives it again as {value.text}; remove one of them", key)
