"""The copy of a run elsewhere, in both directions: what is there is whole, and nothing that fails there stops a run."""

import os
import signal
from unittest import mock

import fsspec
import pytest
import torch

from clipfast.training import remote
from clipfast.training.loop import train
from clipfast.training.remote import RemoteCopy
from clipfast.training.run import RunFolder

from .conftest import run_command
from .test_checkpointing import saved, signalled_after
from .test_training import command, config, same, saved_step


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


class TestRemote:
    """A copy of the run elsewhere, in both directions."""

    def contents(self, fs, root="/copies/run"):
        return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}

    def test_the_copy_is_the_run(self, memory, shards, tmp_path):
        given = config(shards, tmp_path, save_every=1, save_frequency=1, remote_sync="memory://copies", workers=0)
        folder, _ = train(given)
        expected = {
            path.relative_to(folder.path).as_posix(): path.read_bytes()
            for path in folder.path.rglob("*")
            if path.is_file() and path.name != "run.lock"
        }
        copied = self.contents(memory)
        assert copied.keys() == expected.keys()
        assert {name for name in copied if copied[name] != expected[name]} <= {"out.log"}
        assert sorted(name for name in copied if "step_" in name) == ["checkpoints/step_7.pt", "checkpoints/step_8.pt"]

    def test_order_and_sizes(self, memory, store, monkeypatch):
        put, copied = [], []
        for name, calls in (("put_file", put), ("cp_file", copied)):
            original = getattr(memory, name)
            monkeypatch.setattr(
                memory,
                name,
                lambda *args, original=original, calls=calls, **k: (calls.append(args[1]), original(*args, **k))[1],
            )
        (store.folder.parent / "metrics.jsonl").write_text("{}\n")
        (store.folder.parent / "link").symlink_to("/etc/passwd")
        saved(store, 4, milestone=1)
        copy = RemoteCopy(RunFolder(store.folder.parent), "memory://copies")
        copy.sync()
        copy.sync()
        root = "/copies/run"
        assert put == [f"{root}/checkpoints/step_4.pt", f"{root}/metrics.jsonl"]
        assert copied == [f"{root}/checkpoints/epoch_1.pt", f"{root}/checkpoints/epoch_latest.pt"]
        # nothing of what is there goes up again from another process
        RemoteCopy(RunFolder(store.folder.parent), "memory://copies").sync()
        assert len(put) == 2
        saved(store, 5)
        copy.sync()
        assert put[2:] == [f"{root}/checkpoints/step_5.pt"]

    def test_a_store_that_fails_stops_nothing(self, memory, shards, tmp_path, monkeypatch):
        original, calls = type(memory).put_file, []

        def failing(self, *args, **options):
            calls.append(args)
            if len(calls) <= 4:
                raise OSError("503 slow down")
            return original(self, *args, **options)

        monkeypatch.setattr(type(memory), "put_file", failing)
        folder, _ = train(config(shards, tmp_path, remote_sync="memory://copies", workers=0))
        assert "failed: OSError('503 slow down'). Training goes on" in (folder.path / "out.log").read_text()
        assert "checkpoints/epoch_latest.pt" in self.contents(memory)

    def test_a_bucket_that_is_gone_is_an_error(self, memory, store, monkeypatch):
        saved(store, 4)
        copy = RemoteCopy(RunFolder(store.folder.parent), "memory://copies")
        gone = mock.Mock(side_effect=FileNotFoundError("the bucket does not exist"))
        monkeypatch.setattr(type(memory), "put_file", gone)
        with pytest.raises(FileNotFoundError, match="the bucket does not exist"):
            copy.sync()

    def test_latest_does_not_move_before_its_data(self, memory, store, monkeypatch):
        saved(store, 1)
        copy = RemoteCopy(RunFolder(store.folder.parent), "memory://copies")
        copy.sync()
        before = self.contents(memory)
        saved(store, 2)
        monkeypatch.setattr(type(memory), "put_file", mock.Mock(side_effect=OSError("no")))
        with pytest.raises(OSError, match="no"):
            copy.sync()
        assert self.contents(memory) == before

    def test_files_are_replaced_as_a_whole(self, store, tmp_path, monkeypatch):
        saved(store, 1)
        copy = RemoteCopy(RunFolder(store.folder.parent), f"file://{tmp_path}/copies")
        copy.sync()
        latest = tmp_path / "copies/run/checkpoints/epoch_latest.pt"
        before = latest.read_bytes()
        saved(store, 2)
        original = type(copy._fs).mv

        def checking(self, *args, **options):
            assert latest.read_bytes() == before
            return original(self, *args, **options)

        monkeypatch.setattr(type(copy._fs), "mv", checking)
        copy.sync()
        assert latest.read_bytes() == store.latest.read_bytes() != before
        assert not list(latest.parent.glob(".*"))

    def test_another_machine_goes_on(self, memory, shards, tmp_path, capsys):
        arguments = [*command(shards, tmp_path / "a"), "--remote-sync", "memory://copies", "--resume", "latest"]
        with signalled_after(6, signal.SIGTERM):
            assert run_command(capsys, *arguments)[0] == 0
        there = [str(tmp_path / "b") if word == str(tmp_path / "a") else word for word in arguments]
        code, _, err = run_command(capsys, *there)
        assert code == 0, err
        assert "Step 6 was downloaded from memory://copies/run" in err
        assert "at step 6 of 24" in err
        assert len(RunFolder(tmp_path / "b/run").metrics()) > 0
        # and the first one does not overwrite what the other did
        code, _, err = run_command(capsys, *arguments[:-2], "--resume", tmp_path / "a/run")
        assert code == 2
        assert "memory://copies/run holds a checkpoint of step 24: go on from it with --resume latest" in err
        assert run_command(capsys, *arguments)[0] == 0
        assert same(tmp_path / "a/run", tmp_path / "b/run")

    def test_what_is_damaged_there_is_not_taken(self, memory, store, tmp_path):
        saved(store, 1, 2)
        RemoteCopy(RunFolder(store.folder.parent), "memory://copies").sync()
        memory.pipe_file("/copies/run/checkpoints/step_2.pt", store.step_path(2).read_bytes()[:-100])
        memory.pipe_file("/copies/run/checkpoints/step_9.pt", store.step_path(1).read_bytes())
        other = RunFolder(tmp_path / "other/run")
        said = RemoteCopy(other, "memory://copies").restore()
        assert saved_step(other.path) == 1
        assert [path.name for path in other.kept()] == ["epoch_latest.pt"]
        assert "step_9.pt is not used: it holds another step than its name says" in said[0]
        assert "step_2.pt is not used: " in said[1]
        assert said[2:] == ["Step 1 was downloaded from memory://copies/run"]
        # a local one that is as new is left alone
        memory.rm_file("/copies/run/checkpoints/step_9.pt")
        assert RemoteCopy(RunFolder(store.folder.parent), "memory://copies").restore() == []

    def test_a_good_one_there_replaces_a_damaged_one_here(self, memory, store):
        saved(store, 1, 2)
        copy = RemoteCopy(RunFolder(store.folder.parent), "memory://copies")
        copy.sync()
        os.truncate(store.latest, 100)
        copy.restore()
        assert saved_step(store.folder.parent) == 2

    def test_what_cannot_work_is_refused(self, memory, shards, tmp_path, capsys, monkeypatch):
        with pytest.raises(ValueError, match="--remote-sync nothing://x cannot be used: Protocol not known: nothing"):
            train(config(shards, tmp_path, remote_sync="nothing://x"))
        assert not (tmp_path / "run").exists()
        memory.pipe_file("/copies/run/checkpoints/step_3.pt", b"x")
        with pytest.raises(ValueError, match="copies/run holds a checkpoint of step 3: go on from it with --resume"):
            train(config(shards, tmp_path, remote_sync="memory://copies", workers=0))
        assert not (tmp_path / "run").exists()
        # a checkpoint from somebody else names no place to send a run to
        monkeypatch.chdir(tmp_path)
        content = {"state_dict": {}, "clipfast": {"config": {"train_data": "x.tar", "remote_sync": "s3://theirs"}}}
        torch.save(content, "x.pt")
        code, _, err = run_command(capsys, "train", "--resume", "x.pt")
        assert code == 2
        assert "x.pt copies the run to s3://theirs: give --remote-sync yourself" in err
