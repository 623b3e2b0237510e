"""WiSE-FT: models between two checkpoints, their evaluation by ``clipfast interpolate``, and refused checkpoints."""

import dataclasses
import json

import pytest
import torch

from clipfast import create_model
from clipfast.checkpoints.checkpoint import CheckpointError, write_checkpoint
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.evaluate.interpolation import Interpolation, evaluate_path
from clipfast.evaluate.labelled import LabelledSet
from clipfast.models import build
from clipfast.models.naflex_config import NaFlexConfig
from clipfast.models.registry import read_model_config

from ..models.siglip import CONFIGS, save_tokenizer
from ..models.siglip import make_model as make_siglip
from ..small_runs import RESNET, TINY, picture, run_command, sample, write_shard
from .eval_commands import evaluated, split, wrong_inputs

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def saved(path, config, seed, preprocessing=PREPROCESSING, dtype=torch.float32):
    """Write a checkpoint with random weights, one of the two to interpolate."""
    torch.manual_seed(seed)
    model = build(config).to(dtype)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
            elif buffer.ndim == 0:
                buffer.add_(seed)
    own = {"model_config": config.to_dict(), "preprocess_cfg": preprocessing}
    write_checkpoint(path, {"state_dict": model.state_dict(), "clipfast": own})
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the two checkpoints to interpolate and two sets of images, and return their folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = read_model_config(TINY)
    saved(folder / "a.pt", config, 1)
    saved(folder / "b.pt", config, 2)
    for name, seed in (("old", 0), ("new", 50)):
        write_shard(folder / f"{name}.tar", [sample(index, png=picture(seed + index)) for index in range(12)])
    return folder


def test_weights_lie_on_the_line_between_the_checkpoints(tmp_path):
    config = read_model_config(RESNET)
    first, second = (saved(tmp_path / f"{seed}.pt", config, seed, dtype=torch.float16).state_dict() for seed in (1, 2))
    models = Interpolation(tmp_path / "1.pt", tmp_path / "2.pt")
    start, middle, end = map(models.weights, (0.0, 0.3, 1.0))
    assert start.keys() == middle.keys() == end.keys() == first.keys()
    for name, value in first.items():
        if value.is_floating_point():
            assert torch.equal(start[name], value.float())
            assert torch.equal(end[name], second[name].float())
            mixed = 0.7 * value.double() + 0.3 * second[name].double()
            torch.testing.assert_close(middle[name].double(), mixed, rtol=1e-5, atol=1e-6)
        else:  # BatchNorm's num_batches_tracked are integers, taken from the first checkpoint
            assert middle[name] == value


@pytest.fixture
def interpolate(folder, capsys):
    """Return a function that runs ``clipfast interpolate`` on the two checkpoints, and returns its output."""

    def run(words, code=0, **folders):
        """Run ``clipfast interpolate`` on the two checkpoints, and return its output."""
        given = split(words, at=folder, **folders)
        found, out, error = run_command(capsys, "interpolate", folder / "a.pt", folder / "b.pt", *given)
        assert found == code, error
        assert not (code and out)
        return error if code else out

    return run


def test_the_command(folder, interpolate, tmp_path, capsys):
    sets = f"--val-data {folder}/old.tar", f"--val-data {folder}/new.tar"
    words = "--plot {tmp}/p.png --json {tmp}/r.json --alpha 1 0 0.5 0.5 --save 0.5 {tmp}/both"
    lines = interpolate(" ".join((*sets, words)), tmp=tmp_path).splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["[1]", "[2]", "alpha", "0", "0.5", "1"]
    assert f"load it as local-dir:{tmp_path}/both" in lines[-1]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    path = json.loads((tmp_path / "r.json").read_text())["path"]
    models = [folder / "a.pt", f"local-dir:{tmp_path}/both", folder / "b.pt"]
    for row, model, line in zip(path, models, lines[3:-1], strict=True):
        for data in (f"{folder}/old.tar", f"{folder}/new.tar"):
            expected = evaluated(capsys, "zeroshot", "--model", model, "--data", data)
            assert row["results"][data] == {key: expected[key] for key in row["results"][data]}
            assert f"{expected['zero_shot']['top5']:.2%}" in line
    assert len({json.dumps(row["results"]) for row in path}) == 3


def test_a_naflex_run_with_longer_sequences(tmp_path):
    tower = NaFlexConfig(layers=1, width=32, head_width=16, patch_size=4, pool="avg", image_seq_len=25)
    config = dataclasses.replace(read_model_config(TINY), vision=tower)
    saved(tmp_path / "a.pt", config, 1)
    saved(tmp_path / "b.pt", config.with_vision(image_seq_len=49, enable_patch_interpolator=True), 2)
    models = Interpolation(tmp_path / "a.pt", tmp_path / "b.pt")
    models.save(0.5, tmp_path / "both")
    assert create_model(f"local-dir:{tmp_path}/both").visual.image_seq_len == 25


def test_folders_and_siglip(tmp_path):
    pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    models = [make_siglip(CONFIGS["exact"]) for _ in range(2)]
    models[1].load_state_dict({name: 2 * value for name, value in models[0].state_dict().items()})
    for number, model in enumerate(models):
        export_open_clip(model, tmp_path / str(number))
    save_tokenizer(tmp_path / "1")
    write_shard(tmp_path / "s.tar", [sample(index) for index in range(4)])
    mixed = Interpolation(f"local-dir:{tmp_path}/0", tmp_path / "1")
    (row,) = evaluate_path(mixed, [0.5], {"s": LabelledSet(str(tmp_path / "s.tar"))})
    assert row["results"]["s"]["images"] == 4
    mixed.save(0.5, tmp_path / "both")
    assert (tmp_path / "both" / "tokenizer.json").is_file()
    both = create_model(f"local-dir:{tmp_path}/both").state_dict()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(both[name], 1.5 * value, rtol=1e-5, atol=1e-8)


def test_what_cannot_be_mixed(folder, tmp_path):
    config = read_model_config(TINY)
    for changes, preprocessing, message in (
        ({"embed_dim": 32}, {}, "embed_dim is 16 in the first and 32 in the second"),
        ({"quick_gelu": True}, {}, "quick_gelu is False in the first and True in the second"),
        ({}, {"mean": [0.1, 0.5, 0.5]}, r"mean is \[0.5, 0.5, 0.5\] in the first and \[0.1, 0.5, 0.5\] in the"),
    ):
        saved(tmp_path / "other.pt", dataclasses.replace(config, **changes), 0, PREPROCESSING | preprocessing)
        with pytest.raises(CheckpointError, match=f"cannot be interpolated: {message}"):
            Interpolation(folder / "a.pt", tmp_path / "other.pt")
    dropping = config.with_vision(patch_dropout=0.5)  # a setting that does not prevent interpolation
    saved(tmp_path / "dropping.pt", dropping, 0)
    models = Interpolation(folder / "a.pt", tmp_path / "dropping.pt")
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be from 0"):
            models.weights(alpha)


def test_bare_weights_need_the_name_of_the_model(folder, tmp_path):
    torch.save(build(read_model_config(TINY)).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="--model"):
        Interpolation(folder / "a.pt", tmp_path / "bare.pt")
    # Bare weights state no preprocessing, so the default one is assumed, which differs from that of a.pt.
    with pytest.raises(CheckpointError, match="cannot be interpolated: mean is"):
        Interpolation(folder / "a.pt", tmp_path / "bare.pt", model=TINY)


WRONG = {
    "": "--val-data or --save is needed",
    "--plot p.png --save 0 x": "--plot and --json need --val-data",
    "--alpha 1.5 --val-data old.tar": "alpha must be from 0 (A) to 1 (B), got 1.5",
    "--save 2 x": "alpha must be from 0 (A) to 1 (B), got 2.0",
    "--save half x": "got 'half' as the alpha",
    "--save 0.5 .": ". exists already: give another name",
    "--val-data old.tar --val-data old.tar": "--val-data old.tar is given more than once",
    "--val-data old.tar --tokenizer x": "which needs no file: leave x out",
}


@wrong_inputs(WRONG)
def test_wrong_input_is_one_clear_line(folder, interpolate, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    before = set(folder.iterdir())
    last = interpolate(words, 2).splitlines()[-1]
    assert last.startswith("clipfast interpolate: error: ")
    assert message in last
    assert set(folder.iterdir()) == before
