"""Test the validation of the GPU model: published figures, committed errors, and the document that shows both."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from clipfast.bench.inspection import validation
from clipfast.bench.inspection.validation import figures, flex, kernels, passes, sources, tables
from clipfast.bench.inspection.validation.__main__ import main
from clipfast.bench.inspection.validation.recording import recording

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/tables/gpu-model.md"


def kept():
    """Return the committed results of the validation of the model of a GPU."""
    return json.loads((validation.FOLDER / "results.json").read_text())


def test_errors_and_document_are_those_of_the_results(tmp_path):
    assert tables.errors_of(kept()) == {kind: dataclasses.asdict(band) for kind, band in validation.errors().items()}
    copy = tmp_path / "document.md"
    copy.write_text(DOCUMENT.read_text())
    tables.write(copy, kept())
    assert copy.read_text() == DOCUMENT.read_text()


def test_results_are_of_the_figures_and_every_figure_has_a_source_and_a_kernel():
    known, found = figures.sources(), list(figures.figures())
    for figure, result in zip(found, kept(), strict=True):
        assert (result["name"], result["published"]) == (figure.name, f"{figure.value} {figure.unit}")
        if figure.unit == "ms" and result["published_ms"] is not None:
            assert result["published_ms"] == pytest.approx(figure.value)
        assert known[figure.source].keys() == {"title", "url", "card", "versions", "timed"}
        assert callable(getattr(kernels, figure.kernel, None) or getattr(passes, figure.kernel))
        assert figure.machine in figures.MACHINES
        assert figure.value > 0
    assert len({figure.name for figure in found}) == len(found)


def test_errors_are_logarithms_of_what_the_newest_triton_says():
    double = {"kind": "loss", "published_ms": 1.0, "predicted_ms": {"3.9": 4.0, "3.10": 2.0}}
    half = {"kind": "loss", "published_ms": 2.0, "predicted_ms": {"3.9": 1.0}}
    none = {"kind": "loss", "published_ms": None, "predicted_ms": {}}
    found = tables.errors_of([double, half, none])["loss"]
    two = round(math.log(2.0), 3)
    middle = {"points": 2, "bias": 0.0, "middle": 0.0, "low": -two, "high": two}
    assert found == middle | dict.fromkeys(("median", "p90", "worst"), two)


def test_four_in_five_leave_out_a_tenth_at_either_end():
    ratios = [0.1, *[0.8, 0.9, 1.0, 1.1] * 2, 5.0]
    band = figures.bands([("loss", math.log(ratio)) for ratio in ratios])["loss"]
    assert math.exp(band.low) == pytest.approx(0.8, rel=1e-3)
    assert math.exp(band.high) == pytest.approx(1.1, rel=1e-3)


def test_sources_are_pinned_and_refused_when_they_differ(tmp_path, capsys):
    assert main(["--sources", str(tmp_path), "--fetch"]) == 0
    printed = capsys.readouterr().out
    assert all(file.url in printed and file.commit in printed for file in sources.FILES.values())
    file = sources.FILES["integer product"]
    with pytest.raises(sources.Missing, match="is missing: get it from https://"):
        sources.module(tmp_path, "integer product")
    (tmp_path / file.place).parent.mkdir(parents=True)
    (tmp_path / file.place).write_text("something else")
    with pytest.raises(sources.Missing, match="is not the pinned file"):
        sources.module(tmp_path, "integer product")
    with (
        pytest.raises(sources.Missing, match="pip install --no-deps"),
        sources.package(tmp_path, "liger-kernel", "0.8.0"),
    ):
        pass


@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr = 1024):
    """Double a vector: a kernel whose launch the validation of the GPU's model records."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def doubled(x):
    """Launch a kernel like an upstream wrapper, which asks for the tensors' device and runs a PyTorch op as well."""
    assert x.is_cuda
    assert torch.cuda.get_device_capability(x.device) == (9, 0)
    y = torch.empty_like(x)
    double_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, x.numel())
    return y.sum()


def test_a_wrapper_is_recorded_and_not_run():
    x, driver = torch.empty(1 << 21), triton.runtime.driver._active
    with recording() as found:
        doubled(x)
    assert triton.runtime.driver._active is driver
    assert x.device.type == "cpu"
    (launched,), (other,) = found.launches, found.others
    assert (launched.name, launched.grid) == ("double_kernel", (2048,))
    assert {"n": 1 << 21, "BLOCK": 1024}.items() <= launched.arguments.items()
    assert launched.arguments["x"] is x
    assert (other.name, other.moved) == ("sum", x.nbytes + 4)


def test_a_figure_is_answered_by_all_kernels_of_the_fastest_variant(monkeypatch, tmp_path):
    with recording() as found:
        doubled(torch.empty(1 << 21))
    once, twice = kernels.of(found, 1e9, variant="once"), kernels.of(found, 1e9, variant="twice")
    twice = dataclasses.replace(twice, launches=twice.launches * 2)
    monkeypatch.setattr(kernels, "doubled", lambda folder, rows: [twice, once], raising=False)
    figure = figures.Figure("doubled", "memory", "liger", "H100", {"rows": 1}, 50.0, "TFLOP/s")
    answer = figures.answer(figure, tmp_path)
    assert answer.published == pytest.approx(1e9 / 50e12 * 1e3)
    assert answer.limit.startswith("once, ")
    at_least = sum(one.moved for one in found.others) + 2 * (4 << 21)
    assert answer.predicted > at_least / 3.35e12 * 1e3


def test_flex_attention_sees_the_blocks_of_a_causal_mask():
    mask = flex.causal_mask(512)
    for side, seen in (("KV", torch.ones(4, 4).tril(-1)), ("Q", torch.ones(4, 4).triu(1))):
        for prefix, blocks in (("", torch.eye(4)), ("FULL_", seen)):
            counts = mask[f"{prefix}{side}_NUM_BLKS"].flatten().tolist()
            lists = zip(mask[f"{prefix}{side}_IDX"][0, 0].tolist(), counts, strict=True)
            assert [row[:count] for row, count in lists] == [row.nonzero().flatten().tolist() for row in blocks]
