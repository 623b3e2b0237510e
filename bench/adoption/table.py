"""The table of the ops on which models of other libraries run after ``apply_to_...``, with the largest errors.

Each version of a library has a section of ``docs/tables/adopt.md``. ``python -m clipfast.bench.adoption`` writes the
sections of the versions that are installed, and leaves the other sections as they are. OpenCLIP's main branch may be in
``PYTHONPATH``.
"""

import collections
import contextlib
import copy
import dataclasses
import importlib
import importlib.metadata
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from clipfast.adopt.tabulate import BEFORE, place_lines
from clipfast.run import MODEL_PARTS

from . import hf_models, shrunk

# The switches of apply_to_open_clip, which are the columns of the table of adopted models.
PARTS = tuple(MODEL_PARTS)
# The largest errors that are allowed, relative to the largest value of each output and of each gradient.
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}
HEAD = """# What each model runs on

This file is written by `python -m clipfast.bench.adoption`, one section for each version of a library.

Each model is shrunk in depth and width, but not in kind, so it has fewer layers than the real model. "5 of 7 (2)"
says that 5 of 7 layers run on our kernels, and note 2 says why the other layers keep their original op; "–" says
that the model has no such layer. The counts are those of a GPU: on a CPU, most layers keep the original op, which
is faster there. To measure the errors, our ops ran on a CPU too. The last columns are the largest errors of a
patched model against the original, over outputs and all gradients, each relative to the largest value of its tensor
(of a gradient: at least a thousandth of the largest of all). In float64 the models are in training mode, and in
float32 in evaluation mode."""


@dataclasses.dataclass(frozen=True)
class Library:
    """A library, and how its models are built, patched and run.

    Attributes:
        module: the name by which the library is imported.
        title: the name of the library in the table.
        names: returns the names of its models.
        build: returns a small model by its name.
        apply: replaces parts of a model by our ops.
        inputs: returns the arguments of a model's forward pass.
        results: returns outputs and gradients by name, given a model and its inputs.
        parts: the switches of ``apply``: the columns of its section.
    """

    module: str
    title: str
    names: Callable[[], Iterable[str]]
    build: Callable[[str], nn.Module]
    apply: Callable[[nn.Module], nn.Module]
    inputs: Callable[[nn.Module], Any] = shrunk.inputs
    results: Callable[[nn.Module, Any], dict[str, Tensor]] = lambda model, given: shrunk.results(model, *given)
    parts: tuple[str, ...] = PARTS

    def heading(self) -> str:
        """Return the heading of a section in the table of adopted models: the library's title and version."""
        return f"{self.title} {importlib.import_module(self.module).__version__}"


def _open_clip_names() -> Iterable[str]:
    """Return the names of OpenCLIP's configurations to adopt, without any that were registered at run time."""
    folder = importlib.resources.files("open_clip").joinpath("model_configs")
    return sorted(path.name.removesuffix(".json") for path in folder.iterdir() if path.name.endswith(".json"))


LIBRARIES = (
    Library("open_clip", "OpenCLIP", _open_clip_names, shrunk.open_clip_model, clipfast.apply_to_open_clip),
    Library(
        "transformers",
        "transformers",
        lambda: [*hf_models.PAIRS, *hf_models.TOWERS],
        hf_models.make,
        clipfast.apply_to_hf,
        hf_models.inputs,
        hf_models.results,
        (*PARTS, "loss"),
    ),
    Library("timm", "timm", lambda: shrunk.TIMM_MODELS, shrunk.timm_model, clipfast.apply_to_timm),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The row of one model in the table: how many of its layers run on our ops.

    Attributes:
        places: for each switch of ``apply``, the number of layers by the op that they run on, or by the original op
            that they keep and the reason.
        errors: the largest error in each dtype of ``LIMITS``; None if the model cannot be built.
        refusal: the reason why the model cannot be built.
    """

    places: Mapping[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    errors: tuple[float, ...] | None = None
    refusal: str = ""


def measure(library: Library, name: str) -> Row:
    """Build a small model, and compare an adopted copy with it in each dtype: outputs and all gradients.

    Raises:
        ValueError: an error is beyond its limit, or the state dicts differ.
    """
    torch.manual_seed(0)
    try:
        model = library.build(name)
    except ImportError as missing:
        return Row(refusal=f"not built: {missing}")
    errors = []
    for dtype, limit in LIMITS.items():
        model = shrunk.in_dtype(model, dtype).train(dtype == torch.float64)
        patched = library.apply(copy.deepcopy(model))
        if list(patched.state_dict()) != list(model.state_dict()):
            raise ValueError(f"{name}: the patched model has another state dict")
        given = library.inputs(model)
        error, where = shrunk.largest_error(library.results(patched, given), library.results(model, given))
        if error > limit:
            raise ValueError(f"{name}: {where} is off by {error:.1e} in {dtype}, and {limit:.0e} is allowed")
        errors.append(error)
    places: dict[str, collections.Counter[str]] = {part: collections.Counter() for part in library.parts}
    for _, part, text in place_lines(patched):
        places[part][text] += 1
    return Row(places, tuple(errors))


def section(library: Library, rows: Mapping[str, Row]) -> str:
    """Return the section of a library in the table of adopted models as Markdown.

    Models whose layers run on the same ops share a row. Notes give the reasons for layers that keep their original op.
    """
    notes: dict[str, int] = {}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        groups.setdefault(cells(row, notes, library.parts), []).append(name)
    head = ["models", *library.parts, "float32", "float64"]
    lines = [f"## {library.heading()}", "", f"With {', '.join(_versions())}.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for texts, names in groups.items():
        found = [row.errors for row in (rows[name] for name in names) if row.errors is not None]
        errors = [f"{max(column):.0e}" for column in zip(*found, strict=True)] or ["", ""]
        lines.append("| " + " | ".join([", ".join(names), *texts, *errors]) + " |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    return "\n".join(lines)


def _versions() -> Iterator[str]:
    """Yield name and version of the packages on which the table of adopted models depends."""
    for name in ("torch", "timm", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            yield f"{name} {importlib.metadata.version(name)}"


def cells(row: Row, notes: dict[str, int], parts: Sequence[str] = PARTS) -> tuple[str, ...]:
    """Return the cells of an adopted model's row, one for each part, such as "5 of 7 (2)" with the note of number 2."""
    if row.refusal:
        return (row.refusal, *[""] * (len(parts) - 1))
    texts = []
    for part in parts:
        counts = row.places[part]
        left = {text.removeprefix(BEFORE): number for text, number in counts.items() if text.startswith(BEFORE)}
        numbers = [notes.setdefault(f"{text}.", len(notes) + 1) for text in left]
        reference = f" ({', '.join(map(str, numbers))})" if numbers else ""
        total = counts.total()
        texts.append(f"{total - sum(left.values())} of {total}{reference}" if total else "–")
    return tuple(texts)


def fill(document: str, text: str) -> str:
    """Return the page of adopted models with the section ``text`` in place of its older version, or at the end."""
    _, *found = document.rstrip("\n").split("\n\n## ")
    sections = {each.partition("\n")[0]: each for each in [*found, text.removeprefix("## ")]}
    return "\n\n## ".join([HEAD, *sections.values()]) + "\n"
