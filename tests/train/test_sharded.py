"""Checkpoints in parts: written by several ranks, read by any number, and refused if they are damaged."""

import json
import os
import pickle
import shutil

import pytest
import torch

from clipfast.checkpoints import sharded
from clipfast.checkpoints.checkpoint import CheckpointError
from clipfast.checkpoints.sharded import check_parts, read_parts, write_parts
from clipfast.distributed.world import ALONE, joined

from ..processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CONTENT = {
    "epoch": 3, "name": "run", "empty": {}, "list": [1, (2.5, None, True)],
    "state_dict": {"a.weight": torch.arange(35.0).reshape(7, 5), "logit_scale": torch.tensor(2.5)},
    "optimizer": {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.arange(4.0).bfloat16()}}},
}  # fmt: skip


def same(ours, theirs):
    """Return True if two sharded checkpoints have the same content: nested dicts, lists and tensors."""
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and ours.dtype == theirs.dtype and ours.equal(theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def written(rank, size, folder):
    """Write a sharded training checkpoint from all ranks twice, the second time with other weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    with joined("cpu", 30) as world:
        for epoch in (2, 3):
            weight = distribute_tensor(
                CONTENT["state_dict"]["a.weight"] - 3 + epoch, init_device_mesh("cpu", (size,)), [Shard(0)]
            )
            content = CONTENT | {"epoch": epoch, "state_dict": CONTENT["state_dict"] | {"a.weight": weight}}
            write_parts(folder, content, world)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a sharded training checkpoint that three ranks have written."""
    path = tmp_path_factory.mktemp("parts")
    (path / "ranks").mkdir()
    run_ranks(written, 3, 3, path / "step_7", folder=path / "ranks")
    return path / "step_7"


@pytest.fixture
def folder(whole, tmp_path):
    """Copy the sharded training checkpoint, for a test to damage."""
    return shutil.copytree(whole, tmp_path / "step_7")


def test_every_rank_writes_and_one_process_reads(whole):
    files = json.loads((whole / "manifest.json").read_text())
    assert sorted(path.name for path in whole.iterdir()) == sorted([*files, "manifest.json"])
    assert sum(name.endswith(".distcp") for name in files) == 3
    assert same(read_parts(whole), CONTENT)
    assert [path.name for path in whole.parent.iterdir() if path.name.endswith(".tmp")] == []


def remanifested(folder, change):
    """Change the manifest of a sharded training checkpoint by the function ``change``."""
    files = json.loads((folder / "manifest.json").read_text())
    change(files)
    (folder / "manifest.json").write_text(json.dumps(files))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def resealed(folder, name):
    """Make the manifest of a sharded checkpoint match a changed file, as an attacker would."""
    remanifested(folder, lambda files: files.update({name: sharded._seal(folder / name)}))


def hide_code_in_the_list(folder):
    """Hide code in the list of tensors of a sharded training checkpoint."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = Evil(str(folder.parent / "ran"))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    resealed(folder, ".metadata")


def replace_rest(folder, content):
    """Replace ``rest.pt``, which holds everything in a sharded training checkpoint except its tensors."""
    torch.save(content, folder / "rest.pt")
    resealed(folder, "rest.pt")


def move_a_part(folder):
    """Let the manifest of a sharded checkpoint name a file outside its folder."""
    shutil.move(folder / "__1_0.distcp", folder.parent / "x")
    remanifested(folder, lambda files: files.update({"../x": files.pop("__1_0.distcp")}))


NO_MANIFEST = "is no whole checkpoint: manifest.json cannot be read"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: os.truncate(folder / ".metadata", 100), r"\.metadata is not the file that was written"),
        (lambda folder: (folder / "__2_0.distcp").unlink(), r"__2_0\.distcp is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), NO_MANIFEST),
        (lambda folder: (folder / "manifest.json").write_text("[1]"), NO_MANIFEST),
        (lambda folder: remanifested(folder, lambda files: files.pop(".metadata")), "json does not list .metadata"),
        (move_a_part, r"\.\./x is missing"),
        (hide_code_in_the_list, "is refused: it is damaged, or is no list"),
        (lambda folder: replace_rest(folder, {"a": Evil(str(folder.parent / "ran"))}), "refused: .* could run code"),
        (lambda folder: replace_rest(folder, {"a": {"name of a tensor": "b"}}), "is damaged: it does not hold b"),
    ],
)
def test_damage(damage, said, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        read_parts(folder)
    assert not (folder.parent / "ran").exists()


def test_a_write_that_fails_leaves_the_folder_as_it_was(folder, monkeypatch):
    def fail(*_):
        """Fail to write the manifest of a sharded training checkpoint."""
        raise OSError("no space")

    monkeypatch.setattr("clipfast.checkpoints.sharded.replace_text", fail)
    with pytest.raises(OSError, match="no space"):
        write_parts(folder, CONTENT | {"epoch": 9}, ALONE)
    check_parts(folder)
    assert same(read_parts(folder), CONTENT)
    monkeypatch.undo()
    write_parts(folder, CONTENT | {"epoch": 9}, ALONE)
    assert read_parts(folder)["epoch"] == 9
