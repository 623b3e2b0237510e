"""The remote copy of a run, in both directions: it holds only complete files, and its failures never stop a run."""

import os
import signal
from unittest import mock

import fsspec
import pytest

from clipfast.runs.folder import RunFolder
from clipfast.train import remote_sync
from clipfast.train.remote_sync import RemoteCopy

from ..small_runs import output_of, refusal_of
from .test_checkpointing import saved
from .test_endings import log_of, signalled_after
from .test_training import command, same, saved_step


@pytest.fixture
def memory(monkeypatch):
    """Return an empty file system in memory, for remote copies of training runs; failed uploads are soon retried."""
    monkeypatch.setattr(remote_sync, "FIRST_WAIT", 0.01)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture
def copy(memory, store):
    """Return the empty remote copy of the training run of ``store``, which has saved a step."""
    saved(store, 4, milestone=1)
    return RemoteCopy(RunFolder(store.folder.parent), "memory://copies")


def contents(fs, root="/copies/run"):
    """Return the files of a training run's remote copy by path."""
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


def test_the_copy_is_the_run_though_the_first_uploads_fail(memory, run_small, monkeypatch):
    original, calls = type(memory).put_file, []

    def failing(self, *args, **options):
        """Upload a file of the training run; the first four uploads fail."""
        calls.append(args)
        if len(calls) <= 4:
            raise OSError("503 slow down")
        return original(self, *args, **options)

    monkeypatch.setattr(type(memory), "put_file", failing)
    folder = run_small(save_every=1, save_frequency=1, remote_sync="memory://copies")
    assert "failed: OSError('503 slow down'). Training goes on" in log_of(folder)
    files = [path for path in folder.path.rglob("*") if path.is_file() and path.name != "run.lock"]
    expected = {path.relative_to(folder.path).as_posix(): path.read_bytes() for path in files}
    copied = contents(memory)
    assert copied.keys() == expected.keys()
    assert {name for name in copied if copied[name] != expected[name]} <= {"out.log"}
    assert sorted(name for name in copied if "step_" in name) == ["checkpoints/step_7.pt", "checkpoints/step_8.pt"]


def test_every_file_goes_up_once(memory, copy, store, monkeypatch):
    put, cp = (mock.Mock(side_effect=getattr(memory, name)) for name in ("put_file", "cp_file"))
    monkeypatch.setattr(memory, "put_file", put)
    monkeypatch.setattr(memory, "cp_file", cp)
    (store.folder.parent / "metrics.jsonl").write_text("{}\n")
    (store.folder.parent / "link").symlink_to("/etc/passwd")
    for _ in range(2):
        copy.sync()
    RemoteCopy(copy.folder, "memory://copies").sync()  # a new process does not upload a file again, either
    saved(store, 5)
    copy.sync()
    root = "/copies/run"
    new = [f"{root}/checkpoints/step_4.pt", f"{root}/metrics.jsonl", f"{root}/checkpoints/step_5.pt"]
    assert [call.args[1] for call in put.call_args_list] == new
    names = [f"{root}/checkpoints/epoch_1.pt", f"{root}/checkpoints/epoch_latest.pt"]
    assert [call.args[1] for call in cp.call_args_list][:2] == names


@pytest.mark.parametrize("error", [FileNotFoundError("the bucket does not exist"), OSError("no")])
def test_what_fails_leaves_what_was_there(error, memory, copy, store, monkeypatch):
    copy.sync()
    before = contents(memory)
    saved(store, 5)
    monkeypatch.setattr(type(memory), "put_file", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match=str(error)):
        copy.sync()
    assert contents(memory) == before


def test_files_are_replaced_as_a_whole(store, tmp_path, monkeypatch):
    saved(store, 1)
    copy = RemoteCopy(RunFolder(store.folder.parent), f"file://{tmp_path}/copies")
    copy.sync()
    latest = tmp_path / "copies/run/checkpoints/epoch_latest.pt"
    before = latest.read_bytes()
    saved(store, 2)
    original = type(copy._fs).mv

    def checking(self, *args, **options):
        """Check that the remote ``epoch_latest.pt`` is still the old one, then give an uploaded file its final name."""
        assert latest.read_bytes() == before
        return original(self, *args, **options)

    monkeypatch.setattr(type(copy._fs), "mv", checking)
    copy.sync()
    assert latest.read_bytes() == store.latest.read_bytes() != before
    assert not list(latest.parent.glob(".*"))


@pytest.mark.usefixtures("memory")
def test_another_machine_goes_on(shards, tmp_path, capsys):
    more = ["--workers", "0", "--epochs", "1", "--remote-sync", "memory://copies", "--resume", "latest"]
    arguments, there = (command(shards, tmp_path / name, *more) for name in "ab")
    with signalled_after(6, signal.SIGTERM):
        output_of(capsys, *arguments)
    _, err = output_of(capsys, *there)
    assert "Step 6 was downloaded from memory://copies/run" in err
    assert "at step 6 of 12" in err
    # the first machine does not overwrite the remote checkpoints of the second
    err = refusal_of(capsys, *arguments[:-2], "--resume", tmp_path / "a/run")
    assert "memory://copies/run holds a checkpoint of step 12: go on from it with --resume latest" in err
    output_of(capsys, *arguments)
    assert same(tmp_path / "a/run", tmp_path / "b/run")


def test_what_is_damaged_there_is_not_taken(memory, copy, store, tmp_path):
    saved(store, 5)
    copy.sync()
    root = "/copies/run/checkpoints"
    memory.pipe_file(f"{root}/step_9.pt", store.step_path(4).read_bytes())
    os.truncate(store.latest, 100)
    copy.restore()  # a good remote checkpoint replaces a damaged local one
    assert saved_step(store.folder.parent) == 5
    memory.pipe_file(f"{root}/step_5.pt", store.step_path(5).read_bytes()[:-100])
    other = RunFolder(tmp_path / "other/run")
    said = RemoteCopy(other, "memory://copies").restore()
    assert [path.name for path in other.kept()] == ["epoch_latest.pt"]
    assert saved_step(other.path) == 4
    assert "step_9.pt is not used: it holds another step than its name says" in said[0]
    assert "step_5.pt is not used: " in said[1]
    assert said[2:] == ["Step 4 was downloaded from memory://copies/run"]
    memory.rm_file(f"{root}/step_9.pt")
    assert copy.restore() == []  # a local checkpoint that is as new as the remote one is kept


def test_what_cannot_work_is_refused(memory, run_small, tmp_path):
    memory.pipe_file("/copies/run/checkpoints/step_3.pt", b"x")
    for url, said in (("nothing://x", "nothing://x .*: nothing"), ("memory://copies", "copies/run .* step 3: .*--res")):
        with pytest.raises(ValueError, match=said):
            run_small(remote_sync=url)
    assert not (tmp_path / "run").exists()
