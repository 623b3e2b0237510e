"""Checkpoints: never half-written, read without running pickles, and refused with a reason if they do not fit."""

import contextlib
import dataclasses
import json
import random

import pytest
import torch

from clipfast import CLIP, CheckpointError, create_model, export_open_clip
from clipfast.checkpoints.checkpoint import load_checkpoint, read_checkpoint, write_checkpoint, write_safetensors
from clipfast.checkpoints.convert import convert_checkpoint
from clipfast.checkpoints.layouts import read_contents
from clipfast.checkpoints.preprocessing import preprocessing_of
from clipfast.checkpoints.sharded import write_parts
from clipfast.distributed.world import ALONE

from ..small_runs import run_command


@pytest.fixture
def model():
    """Return a new model, into which tests load checkpoints."""
    return create_model("ViT-T-8-32")


def test_layouts(model, tmp_path):
    state = create_model("ViT-T-8-32").state_dict()
    of_fsdp = state | {"logit_scale": state["logit_scale"].reshape(1)}
    for content in ({"state_dict": {"module." + name: value for name, value in state.items()}}, of_fsdp):
        torch.save(content, tmp_path / "w.pt")
        load_checkpoint(model, tmp_path / "w.pt")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_something_else_in_a_good_file(tmp_path):
    for content in ({"state_dict": [1]}, {"state_dict": {"a": 3}}, [1], 5):
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="is not a checkpoint: it holds no tensors by name"):
            read_checkpoint(tmp_path / "w.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "step": 2}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no tensors by name, but 'model', 'step'; save a state_dict"):
        read_checkpoint(tmp_path / "w.pt")


def test_damaged_files_raise_nothing_else(tmp_path):
    torch.save({"epoch": 1, "state_dict": {"a": torch.randn(8)}}, tmp_path / "w.pt")
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.randn(8)}, {})
    rng = random.Random(0)
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(CheckpointError):
                read_checkpoint(path)
            path.write_bytes(content[: rng.randrange(len(content))])
            with pytest.raises(CheckpointError, match=r"can be read|is refused|is empty|cannot be read"):
                read_checkpoint(path)


def test_weights_that_do_not_fit_change_nothing(model, tmp_path):
    state = dict(model.state_dict())
    before = {name: value.clone() for name, value in state.items()}
    positions = "visual.positional_embedding"
    cases = [
        ("missing text_projection", {name: value for name, value in state.items() if name != "text_projection"}),
        (rf"{positions} is \(13, 128\), the model has \(17, 128\)", state | {positions: torch.zeros(13, 128)}),
        (rf"{positions} is \(65,\), the model has", state | {positions: torch.zeros(65)}),
        (rf"missing .*; {positions} is \(65,\), the model has .*; …", {positions: torch.zeros(65)}),
    ]
    for message, broken in cases:
        torch.save({"state_dict": {name: value + 1 for name, value in broken.items()}}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match=f"does not fit the model: {message}"):
            load_checkpoint(model, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_activation_is_refused(model, tmp_path):
    quick = CLIP(dataclasses.replace(model.config, quick_gelu=True))
    own = {"state_dict": model.state_dict(), "clipfast": {"model_config": model.config.to_dict()}}
    write_checkpoint(tmp_path / "w.pt", own)
    with pytest.raises(CheckpointError, match="was trained with GELU, but the model uses QuickGELU"):
        load_checkpoint(quick, tmp_path / "w.pt")
    export_open_clip(quick, tmp_path / "exported")
    with pytest.raises(CheckpointError, match="was trained with QuickGELU, but the model uses GELU"):
        load_checkpoint(model, tmp_path / "exported" / "open_clip_model.safetensors")
    assert create_model(f"local-dir:{tmp_path}/exported").config.quick_gelu


def test_local_dir_without_a_part(model, tmp_path):
    name, weights, path = f"local-dir:{tmp_path}", "open_clip_model.safetensors", tmp_path / "open_clip_config.json"
    with pytest.raises(CheckpointError, match=r"open_clip_config.json is not a model configuration that can be read"):
        create_model(name)
    export_open_clip(model, tmp_path)
    (tmp_path / weights).unlink()
    with pytest.raises(CheckpointError, match=f"holds no weights: neither {weights} nor open_clip_pytorch_model"):
        create_model(name)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert torch.equal(create_model(name).visual.proj, model.visual.proj)
    path.write_text(path.read_text().replace('"resize_mode": "shortest"', '"resize_mode": "stretch"'))
    with pytest.raises(CheckpointError, match="images with resize_mode 'stretch', clipfast only with 'shortest' or"):
        create_model(name)


def test_bare_weights_do_not_say_their_model(model, tmp_path):
    write_checkpoint(tmp_path / "theirs.pt", {"state_dict": model.state_dict()})
    with pytest.raises(CheckpointError, match="does not say which model it belongs to"):
        create_model(str(tmp_path / "theirs.pt"))


def written(path, shift, *, own=True, parts=False):
    """Write a checkpoint of a run, and return its model, whose logit_scale is ``shift`` above the initial one."""
    model = create_model("ViT-T-8-32-quickgelu")
    with torch.no_grad():
        model.logit_scale += shift
    options = {"train_data": "bundled:emoji/noto", "model": "ViT-T-8-32-quickgelu"}
    about = {"model_config": model.config.to_dict(), "preprocess_cfg": preprocessing_of(model), "config": options}
    content = {"epoch": 1, "state_dict": model.state_dict()} | ({"clipfast": about} if own else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parts(path, content, ALONE) if parts else write_checkpoint(path, content)
    return model


def unfinished(folder):
    """Write a run that has not ended, with one checkpoint, and return the model of the checkpoint."""
    return written(folder / "checkpoints" / "step_3.pt", 0.1)


def in_parts(folder):
    """Write checkpoints of a run, the newest one sharded (in parts), and return the model of the newest."""
    written(folder / "checkpoints" / "step_2.pt", 0.2)
    return written(folder / "checkpoints" / "step_3", 0.1, parts=True)


def damaged(folder):
    """Write a run whose newest checkpoint is damaged, and return the model of the newest whole one."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_4.pt").write_bytes(b"PK")
    return unfinished(folder)


def of_open_clip(folder):
    """Write the checkpoints of a run of OpenCLIP, and return the model of the newest."""
    (folder / "params.txt").write_text("force_quick_gelu: True\nmodel: ViT-T-8-32\nname: run\n")
    written(folder / "checkpoints" / "epoch_1.pt", 0.2, own=False)
    return written(folder / "checkpoints" / "epoch_2.pt", 0.1, own=False)


def finished(folder, steps=3):
    """Write the folder of a run that has ended, with a checkpoint and an exported model; return the exported model."""
    unfinished(folder)
    (folder / "results.json").write_text(json.dumps({"steps": steps}))
    model = create_model("ViT-T-8-32-quickgelu")
    export_open_clip(model, folder)
    return model


def gone_on(folder):
    """Write a run that was resumed after its end, and return the model of its newest checkpoint."""
    finished(folder, steps=2)
    return unfinished(folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("make", [unfinished, in_parts, damaged, of_open_clip, finished, gone_on])
def test_the_folder_of_a_run_is_its_newest_model(make, tmp_path, caplog, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model, name = make(folder), str(folder)
    newest = {in_parts: "step_3", of_open_clip: "epoch_2.pt"}.get(make, "step_3.pt")
    convert_checkpoint(name, tmp_path / "copy.pt", "clipfast")
    found = create_model(f"local-dir:{name}")
    assert found.config == create_model(str(tmp_path / "copy.pt")).config == model.config
    assert found.state_dict().keys() == model.state_dict().keys()
    assert found.logit_scale.equal(model.logit_scale)
    said = f"{folder}: its newest checkpoint is used, {folder}/checkpoints/{newest}\n"
    assert (said in caplog.text) == (make is not finished)
    assert ("step_4.pt is refused: it is damaged" in caplog.text) == (make is damaged)
    code, out, _ = run_command(capsys, "status", name)
    assert (code, out[:16]) == (0, "run         run:")
    code, out, err = run_command(capsys, "train", "--resume", name, "--print-config")
    assert (code, "bundled:emoji/noto" in out) == (0, make is not of_open_clip), err


def test_a_run_without_a_checkpoint_is_named_as_such(tmp_path):
    for name in ("config.json", "params.txt"):
        (tmp_path / name).write_text("{}")
    for name, read in ((f"local-dir:{tmp_path}", create_model), (str(tmp_path), read_contents)):
        with pytest.raises(CheckpointError, match=f"the run {tmp_path} has no checkpoint yet"):
            read(name)


def test_equal_exports_are_equal_bytes(tmp_path):
    """Equal exports to safetensors have equal bytes, although the library safetensors orders its metadata at random."""
    from safetensors import safe_open

    weights, notes = {"b": torch.zeros(3), "a": torch.ones(2)}, {"é": "\n", "y": '"/', "x": ""}
    for number in range(8):
        write_safetensors(tmp_path / str(number), weights, notes)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == {"format": "pt", **notes}
        assert torch.equal(file.get_tensor("a"), weights["a"])
