"""What an evaluation found, as a file: JSON that can be read by people, by programs and by `compare`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vision_service.errors import ConfigError
from vision_service.evaluation.places import read_text
from vision_service.evaluation.scores import Metrics, Record
from vision_service.types import Task

FORMAT = "vision-service evaluation 1"


@dataclass(frozen=True, slots=True)
class Report:
    """Figures and what they were made of. Two reports of one model and dataset differ in ``ran`` alone.

    Attributes:
        task: ``detect``, ``segment`` or ``classify``.
        model: ``name`` and ``version``.
        dataset: ``path``, ``format``, ``split``, ``classes_file``, ``images`` (how many) and ``class_names`` (the index
            is the class id).
        settings: what was chosen.
        classes: ``mapped``, ``only_in_model`` and ``only_in_dataset``.
        metrics: the overall figures.
        per_class: a row a class of the dataset.
        curves: what is plotted.
        failures: images without an answer, which no figure counts.
        notes: what a reader should know.
        images: a record an image; the task's scorer says what is in it.
        ran: where and how long.
    """

    task: str
    model: dict[str, str]
    dataset: dict[str, Any]
    settings: dict[str, Any]
    classes: dict[str, Any]
    metrics: Metrics
    per_class: list[dict[str, Any]]
    curves: dict[str, Any]
    failures: list[dict[str, str]]
    notes: list[str]
    images: list[Record]
    ran: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """The dataset's; the index is the class id."""
        names: list[str] = self.dataset["class_names"]
        return names

    def class_name(self, class_id: int) -> str:
        """A class in a record; ids past the dataset's are the model's own classes."""
        if 0 <= class_id < len(self.class_names):
            return self.spoken(self.class_names[class_id])
        others: list[str] = self.classes["only_in_model"]
        index = class_id - len(self.class_names)
        return others[index] if self.task == Task.CLASSIFY and 0 <= index < len(others) else "(other)"

    def spoken(self, name: str) -> str:
        """A class of the dataset for people: a WordNet id with the model's word for it."""
        if not name.startswith("n") or not name[1:].isdecimal():
            return name
        words = [row["model"] for row in self.classes["mapped"] if row["dataset"] == name and row["by"] == "WordNet"]
        return f"{words[0]} {name}" if words else name

    def write(self, path: Path) -> None:
        """As JSON: one line an image, so that files can be compared by line tools too.

        Raises:
            ConfigError: it cannot be written.
        """
        data = {"report": FORMAT, **asdict(self)}
        images = data.pop("images")
        head = json.dumps(data, indent=1)
        lines = ",\n  ".join(json.dumps(record, separators=(",", ":")) for record in images)
        write_text(path, f'{head[:-2]},\n "images": [\n  {lines}\n ]\n}}\n')

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what `write` wrote.

        Raises:
            ConfigError: it cannot be read, or is no report.
        """
        try:
            data = json.loads(read_text(path, "the report"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or data.get("report") != FORMAT or not set(names) <= data.keys():
            raise ConfigError(f"{path} is not a report of `vision-service evaluate --report` ({FORMAT!r})")
        return cls(**{name: data[name] for name in names})


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folders it lies in.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
