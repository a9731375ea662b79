"""Which class of a model is which class of a dataset."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vision_service.errors import ConfigError, choices
from vision_service.evaluation.places import listing, read_text
from vision_service.types import Int64Array

SPELLINGS: dict[str, str] = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "television": "tv",
    "hotdog": "hot dog",
    "doughnut": "donut",
    "hairdryer": "hair drier",
    "hairdrier": "hair drier",
    "trafficlight": "traffic light",
    "mobile phone": "cell phone",
    "cellphone": "cell phone",
    "fridge": "refrigerator",
}
"""Names of VOC, Open Images and everyday use, and COCO's for the same thing. Both sides are taken to COCO's."""

BACKGROUNDS = frozenset({"background", "bg", "unlabeled"})
WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True, slots=True, eq=False)
class ClassMapping:
    """From a model's class ids to a dataset's.

    Attributes:
        model_names: the index is the model's class id.
        dataset_names: the index is the dataset's class id.
        to_dataset: int64 ``[len(model_names)]``: the dataset's class id, -1 where it has none.
        by: how each was found, as ``to_dataset``: ``name``, ``spelling``, ``WordNet``, ``file``, ``only``; "" for none.
    """

    model_names: tuple[str, ...]
    dataset_names: tuple[str, ...]
    to_dataset: Int64Array
    by: tuple[str, ...]

    def only_in_model(self) -> list[str]:
        """Names of the model's classes that the dataset lacks."""
        return [name for name, target in zip(self.model_names, self.to_dataset, strict=True) if target < 0]

    def only_in_dataset(self) -> list[str]:
        """Names of the dataset's classes that the model lacks."""
        found = set(self.to_dataset.tolist())
        return [name for index, name in enumerate(self.dataset_names) if index not in found]

    def to_json(self) -> dict[str, Any]:
        """What a report says of it."""
        mapped = [
            {"model": self.model_names[i], "model_id": i, "dataset": self.dataset_names[target], "by": self.by[i]}
            for i, target in enumerate(self.to_dataset.tolist())
            if target >= 0
        ]
        return {"mapped": mapped, "only_in_model": self.only_in_model(), "only_in_dataset": self.only_in_dataset()}


def map_classes(
    model_names: Sequence[str], dataset_names: Sequence[str], file: Path | None = None, *, is_binary: bool = False
) -> ClassMapping:
    """Match by a file, else by name, by spelling, by WordNet id.

    Args:
        model_names: the index is the id.
        dataset_names: the index is the id.
        file: see `read_map`; what it says comes before what the names say.
        is_binary: the dataset has a background and one unnamed class, which the model's only class beside the
            background is.

    Raises:
        ConfigError: the file names what does not exist, or no class at all is in both.
    """
    targets = np.full(len(model_names), -1, np.int64)
    by = [""] * len(model_names)
    for index, target, how in _from_names(model_names, dataset_names):
        targets[index], by[index] = target, how
    if is_binary:
        others = [i for i, name in enumerate(model_names) if _plain(name) not in BACKGROUNDS]
        if len(others) == 1:
            targets[others[0]], by[others[0]] = 1, "only"
    for index, target in (_from_file(file, model_names, dataset_names) if file else {}).items():
        targets[index], by[index] = target, "file" if target >= 0 else ""
    mapping = ClassMapping(tuple(model_names), tuple(dataset_names), targets, tuple(by))
    if not bool((targets >= 0).any()) or mapping.only_in_dataset() == [
        name for name in dataset_names if _plain(name) not in BACKGROUNDS
    ]:
        raise ConfigError(
            f"no class of the model is one of the dataset's: the model has {listing(model_names, 8)}; the dataset has "
            f"{listing(dataset_names, 8)}; write which is which into a file and give it by --map"
        )
    return mapping


def read_map(file: Path) -> dict[str, str]:
    """A file of pairs: the model's class (name or id) and the dataset's class; an empty one means none.

    TOML and JSON are one table of strings; CSV has the two in its first two columns, under a header that is not read.

    Raises:
        ConfigError: it cannot be read, or is not that.
    """
    text = read_text(file, "the map of classes")
    match file.suffix.lower():
        case ".toml":
            pairs = _parsed(file, lambda: tomllib.loads(text))
        case ".json":
            pairs = _parsed(file, lambda: json.loads(text))
        case ".csv":
            rows = [row for row in csv.reader(io.StringIO(text)) if row]
            short = next((number for number, row in enumerate(rows, start=1) if len(row) < 2), None)
            if short is not None:
                raise ConfigError(f"{file}, row {short}: need two columns, the model's class and the dataset's")
            pairs = {row[0].strip(): row[1].strip() for row in rows[1:]}
        case suffix:
            raise ConfigError(f"{file}: a map of classes is .toml, .json or .csv, got {suffix!r}")
    if not isinstance(pairs, dict) or not all(isinstance(value, (str, int)) for value in pairs.values()):
        raise ConfigError(f"{file}: need one table of the model's classes and the dataset's, all of them text")
    return {str(key): str(value) for key, value in pairs.items()}


def _parsed(file: Path, parse: Any) -> Any:
    try:
        return parse()
    except ValueError as error:
        raise ConfigError(f"{file} cannot be parsed: {error}") from None


def _from_file(file: Path, model_names: Sequence[str], dataset_names: Sequence[str]) -> dict[int, int]:
    found: dict[int, int] = {}
    for theirs, ours in read_map(file).items():
        ids = [index for index, name in enumerate(model_names) if name == theirs]
        if not ids and theirs.isdecimal() and int(theirs) < len(model_names):
            ids = [int(theirs)]
        if not ids:
            raise ConfigError(f"{file}: the model has no class {theirs!r}; {choices(theirs, model_names)}")
        if ours and ours not in dataset_names:
            raise ConfigError(f"{file}: the dataset has no class {ours!r}; {choices(ours, dataset_names)}")
        found.update(dict.fromkeys(ids, dataset_names.index(ours) if ours else -1))
    return found


def _from_names(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[tuple[int, int, str]]:
    if all(WORDNET_ID.fullmatch(name) for name in dataset_names) and not set(dataset_names) & set(model_names):
        return _from_wordnet(model_names, dataset_names)
    exact = {name: index for index, name in enumerate(dataset_names)}
    spelled: dict[str, int] = {}
    for index, name in enumerate(dataset_names):
        key = spelling(name)
        if key in spelled and dataset_names[spelled[key]] not in model_names:
            raise ConfigError(f"the dataset's {dataset_names[spelled[key]]!r} and {name!r} read the same; use --map")
        spelled[key] = index
    found = []
    for index, name in enumerate(model_names):
        if name in exact:
            found.append((index, exact[name], "name"))
        elif spelling(name) in spelled and dataset_names[spelled[spelling(name)]] not in model_names:
            found.append((index, spelled[spelling(name)], "spelling"))
    return found


def spelling(name: str) -> str:
    """A name with case, ``_``, ``-`` and the variants of `SPELLINGS` taken out."""
    plain = _plain(name)
    return SPELLINGS.get(plain, plain)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_\-]+", " ", name).lower().split())


def _from_wordnet(model_names: Sequence[str], dataset_names: Sequence[str]) -> list[tuple[int, int, str]]:
    """By timm's table of ImageNet, if the model's classes are ImageNet's in their usual order."""
    synsets, descriptions = _imagenet()
    if len(model_names) != len(synsets):
        return []
    alike = sum(name.lower().split()[0] in text for name, text in zip(model_names, descriptions, strict=True))
    if alike < 0.95 * len(synsets):
        return []
    ids = {synset: index for index, synset in enumerate(synsets)}
    return [(ids[name], index, "WordNet") for index, name in enumerate(dataset_names) if name in ids]


@lru_cache(maxsize=1)
def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """WordNet ids of ImageNet's 1000 classes in order, and what they are, lower case."""
    from timm.data.imagenet_info import ImageNetInfo

    table: Any = ImageNetInfo()
    synsets = tuple(table.label_names())
    return synsets, tuple(table.index_to_description(index).lower() for index in range(len(synsets)))
