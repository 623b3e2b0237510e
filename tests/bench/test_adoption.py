"""Test the committed table of the ops that models of other libraries run on, and the command that writes it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clipfast.bench.adoption import table

TABLE = Path(__file__).parents[2] / "docs/tables/adopt.md"


def open_clip_library() -> table.Library:
    """Return the section of OpenCLIP's models in the benchmark of adoption."""
    pytest.importorskip("open_clip")
    pytest.importorskip("timm")
    return table.LIBRARIES[0]


def expanded(cell: str, notes: dict[int, str]) -> str:
    """Return a cell of the table of adopted models with the texts of its notes in place of their numbers."""
    return re.sub(r"\(([\d, ]+)\)", lambda found: str([notes[int(n)] for n in found[1].split(", ")]), cell)


def read_section(document: str, heading: str) -> dict[str, list[str]]:
    """Return the cells of each model in a section of the table of adopted models, with the texts of notes."""
    (section,) = [part for part in document.split("\n## ") if part.startswith(heading)]
    notes = {int(number): text for number, text in re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE)}
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    found = {}
    for names, *cells in rows:
        texts = [expanded(cell, notes) for cell in cells[:-2]]
        for name in names.split(", "):
            found[name] = texts
    return found


def test_the_committed_table_is_of_every_configuration():
    library = open_clip_library()
    heading, document = library.heading(), TABLE.read_text()
    if f"\n## {heading}\n" not in document:
        pytest.skip(f"the table has no section {heading}")
    found = read_section(document, heading)
    assert sorted(found) == sorted(library.names())
    for name in ("ViT-B-32", "coca_ViT-B-32", "MobileCLIP-S1"):
        notes: dict[str, int] = {}
        cells = table.cells(table.measure(library, name), notes)
        assert [expanded(cell, {number: text for text, number in notes.items()}) for cell in cells] == found[name]


def test_no_error_of_the_committed_table_is_beyond_its_limit():
    document = TABLE.read_text()
    headings = re.findall(r"^## (.*)", document, re.MULTILINE)
    assert {heading.split()[0] for heading in headings} >= {"OpenCLIP", "timm", "transformers"}
    assert len(read_section(document, "timm")) >= 10
    for line in document.splitlines():
        if re.match(r"\| .*\d\.?\d*e", line):
            errors = [float(cell) for cell in line.strip("| ").split(" | ")[-2:]]
            assert all(error <= limit for error, limit in zip(errors, table.LIMITS.values(), strict=True)), line


def library_of(model: nn.Module, **changes: object) -> table.Library:
    """Return a library for the table of adopted models with one model, whose patched copy is the model itself."""
    images = torch.ones(2, 3)

    def inputs(each: nn.Module) -> tuple[torch.Tensor]:
        """Return the inputs of the model in the table of adopted models."""
        return (images.to(next(each.parameters()).dtype),)

    library = table.Library("torch", "PyTorch", lambda: ["linear"], lambda name: model, lambda each: each, inputs)
    return dataclasses.replace(library, **changes)


def wrong(model: nn.Module) -> nn.Module:
    """Return an adopted model with a wrong bias, whose error the table must not accept."""
    with torch.no_grad():
        model.bias.add_(1e-4)
    return model


def renamed(model: nn.Module) -> nn.Module:
    """Return an adopted model with one more parameter, which changes its state dict."""
    model.extra = nn.Parameter(torch.ones(()))
    return model


def test_measuring():
    row = table.measure(library_of(nn.Linear(3, 4)), "linear")
    assert row.errors == (0.0, 0.0)
    assert table.cells(row, {}) == ("–",) * len(table.PARTS)
    with pytest.raises(ValueError, match=r"linear: output 0 is off by .* in torch.float32, and 1e-05 is allowed"):
        table.measure(library_of(nn.Linear(3, 4), apply=wrong), "linear")
    with pytest.raises(ValueError, match="linear: the patched model has another state dict"):
        table.measure(library_of(nn.Linear(3, 4), apply=renamed), "linear")

    def missing(name: str) -> nn.Module:
        """Fail as the build of an adopted model does when a package is missing."""
        raise ModuleNotFoundError("No module named 'torchlibrosa'")

    row = table.measure(library_of(nn.Linear(3, 4), build=missing), "linear")
    assert table.cells(row, {}) == ("not built: No module named 'torchlibrosa'", *[""] * (len(table.PARTS) - 1))
