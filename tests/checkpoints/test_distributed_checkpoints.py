"""Folders of torch.distributed.checkpoint: read without running their pickles, from one process or several."""

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from clipfast import CLIP, CheckpointError, convert_checkpoint, inspect_checkpoint

from ..models.siglip import CONFIGS as SIGLIP_CONFIGS
from ..models.siglip import make_model as make_siglip
from ..processes import run_ranks
from ..small_runs import refusal_of
from .conftest import CONFIGS, Payload, make_model, same_bits, save_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def train_state(model: CLIP) -> dict[str, object]:
    """Return a training checkpoint after one step, as OpenCLIP's and PyTorch's examples save it."""
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "step": 7}


WRAPPED = {
    "bare": lambda model: model.state_dict(),
    "compiled": lambda model: {"state_dict": {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}},
    "with an average": lambda model: {"model": model.state_dict(), "ema": {"m": make_model(model.config).state_dict()}},
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_one_process(wrapped, tmp_path):
    model = make_model(CONFIGS["ResNet" if wrapped == "bare" else "ViT"])
    dcp.save(WRAPPED[wrapped](model), checkpoint_id=tmp_path / "dcp")
    check_converted(tmp_path, model.config, model.state_dict())


def check_converted(folder, config, expected):
    """Convert the distributed checkpoint "dcp" to a clipfast checkpoint, and check its weights and image size."""
    name = save_config(config, folder / "small.json")
    info = convert_checkpoint(folder / "dcp", folder / "out.pt", "clipfast", model=str(name))
    assert info.image_size == config.vision.image_size
    assert same_bits(folder / "out.pt", expected)


def test_what_it_says(tmp_path, capsys):
    model = make_model(CONFIGS["ViT"])
    dcp.save({"app": train_state(model)}, checkpoint_id=tmp_path / "dcp")
    info = inspect_checkpoint(tmp_path / "dcp")
    assert info.layout == "folder of torch.distributed.checkpoint (the model is in 'app.model')"
    assert (info.epoch, info.step, info.activation) == (3, 7, None)
    assert info.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert list(info.sha256) == ["__0_0.distcp"]
    error = refusal_of(capsys, "convert", tmp_path / "dcp", tmp_path / "o", "--to", "hf")
    assert "name its configuration with --model" in error
    siglip = make_siglip(SIGLIP_CONFIGS["exact"])
    dcp.save({"model": siglip.state_dict()}, checkpoint_id=tmp_path / "siglip")
    info = inspect_checkpoint(tmp_path / "siglip")
    assert (info.mean, info.std, info.resize_mode) == ((0.5,) * 3, (0.5,) * 3, "squash")


def save_sharded(rank: int, folder: Path) -> None:
    """Save the checkpoint of a model that FSDP2 has cut into shards, and its optimizer."""
    torch.manual_seed(0)
    model = make_model(CONFIGS["QuickGELU"])
    model.logit_scale = torch.nn.Parameter(model.logit_scale.detach()[None])  # FSDP2 cannot shard scalars
    mesh = init_device_mesh("cpu", (2,))
    for block in model.transformer.resblocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
    dcp.save({"app": state}, checkpoint_id=folder / "dcp")
    full = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in state["model"].items()}
    torch.save(full, folder / f"full_{rank}.pt")


def test_two_ranks_with_shards(tmp_path):
    (tmp_path / "ranks").mkdir()
    run_ranks(save_sharded, 2, tmp_path, folder=tmp_path / "ranks")
    assert len(list((tmp_path / "dcp").glob("*.distcp"))) == 2
    expected = torch.load(tmp_path / "full_0.pt", weights_only=True)
    expected["logit_scale"] = expected["logit_scale"][0]
    check_converted(tmp_path, CONFIGS["QuickGELU"], expected)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a checkpoint that ``torch.distributed.checkpoint`` wrote, in the folder "dcp"."""
    dcp.save(train_state(make_model(CONFIGS["ViT"])), checkpoint_id=tmp_path / "dcp")
    return tmp_path / "dcp"


@contextlib.contextmanager
def listed(folder: Path, shard: object = None):
    """Let a test change the index (.metadata) of a distributed checkpoint, and the index's entry for a projection.

    Args:
        folder: the folder of the checkpoint.
        shard: an object to save in a file of its own, which the index then names as the projection's shard.
    """
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == "model.visual.proj")
    if shard is not None:
        torch.save(shard, folder / "own.distcp")
        place.relative_path, place.offset, place.length = "own.distcp", 0, (folder / "own.distcp").stat().st_size
    yield metadata, place, metadata.state_dict_metadata["model.visual.proj"]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def code_in_the_list(folder):
    """Put code into the index of a distributed checkpoint, and return the error that must follow."""
    with listed(folder) as (metadata, _, _):
        metadata.planner_data = Payload(folder.parent / "ran")
    return "is refused: it is damaged, or is no list of torch.distributed.checkpoint .it holds "


def code_in_a_shard(folder):
    """Put code into a shard of a distributed checkpoint, and return the error that must follow."""
    with listed(folder, Payload(folder.parent / "ran")):
        return "model.visual.proj cannot be read: it is an object other than a tensor or a plain value, which"


def a_shard_elsewhere(folder):
    """Let a distributed checkpoint name a shard outside of its folder, and return the error that must follow."""
    with listed(folder) as (_, place, _):
        place.relative_path = f"../{folder.name}/{place.relative_path}"
    return r"model.visual.proj cannot be read: it lies in '\.\./dcp/__0_0.distcp' in a form"


def a_list_that_is_cut_off(folder):
    """Cut off the index of a distributed checkpoint, and return the error that must follow."""
    os.truncate(folder / ".metadata", (folder / ".metadata").stat().st_size // 2)
    return "is refused: it is damaged"


def a_missing_file(folder):
    """Remove a file of a distributed checkpoint, and return the error that must follow."""
    (folder / "__0_0.distcp").unlink()
    return "is damaged or incomplete: .* cannot be read: .*No such file"


def a_bit_that_has_flipped(folder):
    """Flip a bit in a shard of a distributed checkpoint, and return the error that must follow."""
    with listed(folder) as (_, place, _):
        path = folder / place.relative_path
        content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content[place.offset : place.offset + place.length])) as archive:
        data = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    content[place.offset + data.header_offset + 200] ^= 1
    path.write_bytes(content)
    return "model.visual.proj cannot be read: __0_0.distcp is damaged: the checksum of .*data/0 in it is wrong"


def a_shard_that_is_not_listed(folder):
    """Remove a shard from the index of a distributed checkpoint, and return the error that must follow."""
    with listed(folder) as (_, _, entry):
        entry.chunks.clear()
    return "model.visual.proj cannot be read: its shards do not make the whole"


def another_size(folder, *size, message=r"a shard is \(64, 24\) of torch.float32, and is listed as something else"):
    """Change a tensor's size in the index of a distributed checkpoint, and return the error that must follow."""
    with listed(folder) as (_, _, entry):
        entry.size = entry.chunks[0].sizes = torch.Size(size or [2, 3])
    return f"model.visual.proj cannot be read: {message}"


def a_size_that_fits_no_machine(folder):
    """Give a tensor in the index of a distributed checkpoint 10^18 elements, and return the error that must follow."""
    return another_size(folder, 10**9, 10**9, message="")


def shards_that_overlap(folder):
    """Let two shards of a distributed checkpoint overlap in half of a tensor, and return the error that must follow."""
    with listed(folder, torch.zeros(32, 24)) as (_, _, entry):
        entry.chunks[0].sizes = torch.Size([32, 24])
        entry.chunks.append(entry.chunks[0])
    return "model.visual.proj cannot be read: its shards overlap"


@pytest.mark.parametrize(
    "damage",
    [
        code_in_the_list, code_in_a_shard, a_shard_elsewhere, a_list_that_is_cut_off, a_missing_file,
        a_bit_that_has_flipped, a_shard_that_is_not_listed, another_size, a_size_that_fits_no_machine,
        shards_that_overlap,
    ],
)  # fmt: skip
def test_damage(damage, folder, tmp_path):
    message = damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(folder, tmp_path / "out.pt", "clipfast", activation="gelu")
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {"a": torch.zeros(2)}}, "must hold one model, and it holds none: no name in it ends in logit_scale"),
        (dict.fromkeys(["one", "two"]), r"must hold one model, and it holds several, under 'one.', 'two.'"),
        ({"model": {"vision_model.x": torch.zeros(2), "logit_scale": torch.zeros(())}}, "weights of a transformers"),
    ],
)
def test_other_models(state, message, tmp_path):
    model = make_model(CONFIGS["ViT"]).state_dict()
    dcp.save({key: value or model for key, value in state.items()}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(tmp_path / "dcp")
