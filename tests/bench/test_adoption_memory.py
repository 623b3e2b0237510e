"""The command that measures the memory of a training step of transformers' models."""

import pytest
import torch

from clipfast.bench.adoption import memory


@pytest.mark.parametrize("family", memory.FAMILIES)
def test_without_logits_a_step_takes_less(family):
    pytest.importorskip("transformers")
    pairs = 1536
    theirs, ours = (memory.step_bytes(family, is_ours, pairs) for is_ours in (False, True))
    assert 0 < ours < theirs - pairs**2 * torch.float32.itemsize  # at least the logits


def test_a_step_in_a_process_of_its_own():
    pytest.importorskip("transformers")
    assert memory.measure("siglip", True, 65) > 0


@pytest.mark.long
def test_the_trainer_takes_less_without_logits():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pairs = 1536
    theirs, ours = (memory.measure_trainer(is_ours, pairs) for is_ours in (False, True))
    assert 0 < ours < theirs - pairs**2 * torch.float32.itemsize


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(memory, "measure", lambda family, ours, pairs: pairs * 2 ** (20 - ours) * (family == "clip"))
    monkeypatch.setattr(memory, "measure_trainer", lambda ours, pairs: pairs * 2 ** (21 - ours))
    assert memory.main(["--pairs", "1000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| 1,000 pairs | transformers, MiB | with clipfast.apply_to_hf, MiB |",
        "|---|---|---|",
        "| clip | 1000 | 500 |",
        "| siglip | 0 | 0 |",
        "| clip, Trainer, on each of 2 ranks | 2000 | 1000 |",
    ]
    with pytest.raises(SystemExit):
        memory.main(["--pairs", "0"])
    assert "--pairs must be at least 1, got 0" in capsys.readouterr().err
