"""Test the committed table of the ops that models of other libraries run on, and the command that writes it."""

import collections
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from clipfast.adopt import places
from clipfast.bench.adoption import __main__ as command
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


def test_models_that_run_on_the_same_are_one_row():
    def row(error: float, **places: dict[str, int]) -> table.Row:
        """Return a row of the table of adopted models with these parts and error."""
        found = {part: collections.Counter(places.get(part, {})) for part in table.PARTS}
        return table.Row(found, (error, error / 1e3))

    ours, left = "clipfast.attention", "as before: its mask hides padding"
    rows = {
        "a": row(1e-7, attention={ours: 3, left: 2}, norms={"clipfast.layer_norm": 4}),
        "b": row(3e-7, attention={ours: 2, "clipfast.attention, causal": 1, left: 2}, norms={"clipfast.layer_norm": 4}),
        "c": row(0.0, attention={left: 2, "as before: other": 1}),
    }
    text = table.section(library_of(nn.Linear(3, 4)), rows)
    assert "| a, b | 3 of 5 (1) | 4 of 4 | – | – | – | – | – | – | 3e-07 | 3e-10 |\n| c | 0 of 3 (1, 2) |" in text
    assert text.endswith("\n\n1. its mask hides padding.\n2. other.")


def test_the_command_writes_a_section_in_the_place_of_its_older_one(tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(table, "LIBRARIES", (library_of(nn.Linear(3, 4)),))
    monkeypatch.setattr(places, "CPU_DTYPES", places.CPU_DTYPES)  # restored after the test, since the command sets it
    path = tmp_path / "table.md"
    path.write_text(
        table.fill(table.fill(table.HEAD, "## PyTorch 0\n\nkept"), f"## PyTorch {torch.__version__}\n\nold")
    )
    assert command.main(["--file", str(path)]) == 0
    text = path.read_text()
    assert f"kept\n\n## PyTorch {torch.__version__}\n" in text
    assert "old" not in text.removeprefix(table.HEAD)
    assert text.count("| linear | – | – | – | – | – | – | – | – | 0e+00 | 0e+00 |") == 1
    with pytest.raises(SystemExit):
        command.main(["open-clip", "--file", str(path)])
    assert "open-clip" in capsys.readouterr().err
