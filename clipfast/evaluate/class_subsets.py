"""The classes that a shifted set, such as ImageNet-R, shares with its base, such as ImageNet.

Both sets are evaluated on the shared classes only (Taori et al. 2020).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .classification import Classified, classify
from .features import LabelledFeatures
from .labelled import in_order

ClassMap = Mapping[str, Sequence[str | int]]


@dataclasses.dataclass(frozen=True)
class ClassSubset:
    """The classes that a shifted set and its base set share.

    Attributes:
        names: the names of the shared classes.
        members: for each shared class the indices of the base's classes that belong to it. Any of them is a right
            answer.
        of_label: the index of the shared class for each label of the shifted set that belongs to one.
        of_base: the index of the shared class for each label of the base that belongs to one.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    of_label: Mapping[str, int]
    of_base: Mapping[str, int]

    @classmethod
    def of(cls, base: Sequence[str], found: Mapping[str, tuple[int, ...]], name: str) -> ClassSubset:
        """Return the shared classes, given the base classes of each label. Labels that share a base class are merged.

        Args:
            base: the labels of the base, in their order.
            found: the indices of the base's classes that each label means, as :func:`match_classes` finds them.
            name: the name of the set, for error messages.

        Raises:
            ValueError: no label means a class of the base.
        """
        group_with: dict[int, set[int]] = {}
        for numbers in found.values():
            group = set(numbers).union(*(group_with[number] for number in numbers if number in group_with))
            group_with.update(dict.fromkeys(group, group))
        members = sorted({min(group): tuple(sorted(group)) for group in group_with.values()}.values())
        if not members:
            raise ValueError(f"{name} has no class of the base, whose first one is {base[0]!r}")
        place = {number: place for place, group in enumerate(members) for number in group}
        of_label = {label: place[numbers[0]] for label, numbers in found.items() if numbers}
        first = {place: label for label, place in reversed(list(of_label.items()))}
        return cls(
            tuple(base[group[0]] if len(group) == 1 else first[place] for place, group in enumerate(members)),
            tuple(members),
            of_label,
            {base[number]: group for number, group in place.items()},
        )

    def classify(self, images: LabelledFeatures, meaning: Mapping[str, int], classifier: Tensor) -> Classified:
        """Return the predictions of the base's zero-shot classifier, restricted to the shared classes.

        Args:
            images: the images of the base or of the shifted set.
            meaning: ``of_base`` for images of the base, ``of_label`` for images of the shifted set; images whose label
                is not in it are left out.
            classifier: the weights [D, classes of the base].
        """
        rows = [row for row, label in enumerate(images.labels) if label in meaning]
        columns = [number for numbers in self.members for number in numbers]
        owner = torch.tensor([group for group, numbers in enumerate(self.members) for _ in numbers])
        numbers = [meaning[images.labels[row]] for row in rows]
        places = tuple(str(group) for group in range(len(self.names)))  # since ``names`` may contain duplicates
        found = classify(
            images.features.to(classifier.device)[rows], [places[number] for number in numbers], places,
            classifier[:, columns], owner=owner,
        )  # fmt: skip
        return found._replace(classnames=self.names)


def match_classes(
    base: Sequence[str], labels: Sequence[str], given: ClassMap | None, name: str
) -> dict[str, tuple[int, ...]]:
    """Return the indices of the base's classes that each label of a shifted set means; () for labels to leave out.

    A label means the classes that ``given`` lists for it, or else the class of the base with the same label. If the
    labels are the numbers of all classes, as in ImageNet-V2, label i means class i.

    Args:
        base: the labels of the base, in their order.
        labels: the labels of the shifted set.
        given: the user's class map: for each label, labels of the base or indices of its classes.
        name: the name of the set, for error messages.

    Raises:
        ValueError: a label means no class of the base, or its classes seem to be numbered by another list.
    """
    numbers = {label: number for number, label in enumerate(base)}
    given = given or {}
    found = {label: _mapped_classes(base, numbers, label, given[label], name) for label in labels if label in given}
    rest = in_order(label for label in labels if label not in given)
    if rest and all(label.isdecimal() for label in rest) and list(base) != rest:
        values = [int(label) for label in rest]
        if values == list(range(len(base))):
            return {**found, **{label: (number,) for number, label in enumerate(rest)}}
        if len(values) > 1 and values in (list(range(len(values))), list(range(1, len(values) + 1))):
            raise ValueError(
                f"{name} has classes {rest[0]} to {rest[-1]}, which seem to be numbered by a list of its own, and the "
                f"base has {len(base)}: say by --class-map {name}=FILE what they mean"
            )
    unknown = [label for label in rest if label not in numbers]
    if unknown:
        raise ValueError(
            f"{name} has {len(unknown)} labels that the base lacks, such as {unknown[0]!r}: say by --class-map "
            f"{name}=FILE what they mean, or name the right key by --label-by"
        )
    return {**found, **{label: (numbers[label],) for label in rest}}


def _mapped_classes(
    base: Sequence[str], numbers: Mapping[str, int], label: str, meanings: Sequence[str | int], name: str
) -> tuple[int, ...]:
    """Return the indices of the base's classes that a class map lists (``meanings``) for a label of a shifted set."""
    found = set()
    for meaning in meanings:
        number = numbers.get(meaning) if isinstance(meaning, str) else meaning
        if number is None or not 0 <= number < len(base):
            raise ValueError(f"class map of {name}: {label!r} is {meaning!r}, which is no class of the base")
        found.add(number)
    return tuple(sorted(found))


def read_class_map(path: Path) -> ClassMap:
    """Read a class map of a shifted set (``--class-map``) from a JSON file.

    It maps each label to a label of the base, the index of a class of the base, or a list of these.

    Raises:
        ValueError: the file does not exist, or does not hold a class map.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object of labels, not {type(content).__name__}")
    found = {label: value if isinstance(value, list) else [value] for label, value in content.items()}
    for label, values in found.items():
        if any(not isinstance(value, str | int) or isinstance(value, bool) for value in values):
            raise ValueError(f"{path}: {label!r} must be a label of the base, the number of a class, or a list")
    return found


def read_json(path: Path) -> object:
    """Return the content of a JSON file that the user gave to an evaluation.

    Raises:
        ValueError: the file does not exist, or is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return content
