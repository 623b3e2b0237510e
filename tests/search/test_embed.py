"""clipfast embed: the same content however it is made, interrupted or shared; and clear words where it cannot be."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings, create_model, files
from clipfast.checkpoint import export_open_clip
from clipfast.evaluation.encoder import Encoder
from clipfast.factory import get_tokenizer, transform_of
from clipfast.ranks import run_ranks
from clipfast.search import embed, embed_command, layout
from clipfast.search.samples import Samples

from ..clip.conftest import run_command, sample, write_shard
from .embedding import TINY, content, make, options

pytest.importorskip("pyarrow")
pytest.importorskip("tqdm")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_threads_and_workers_change_nothing(whole, faulty, tmp_path, capsys, threads, workers):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        make(capsys, faulty, tmp_path / "e", workers=str(workers))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert content(tmp_path / "e") == content(whole)


def as_rank(rank, size, arguments):
    """Run the command as one of the processes of torchrun."""
    from clipfast.cli import main

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    made = []
    write = embed.write_part
    with mock.patch.object(embed, "write_part", lambda *given: (made.append(given[2]), write(*given))):
        assert main(arguments) == 0
    return made


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same(whole, faulty, tmp_path, size):
    (tmp_path / "ranks").mkdir()
    made = run_ranks(as_rank, size, size, options(faulty, tmp_path / "e", workers="0"), folder=tmp_path / "ranks")
    assert content(tmp_path / "e") == content(whole)
    assert made == [list(range(5))[rank::size] for rank in range(size)]


def test_wherever_it_is_stopped_it_goes_on(whole, faulty, tmp_path, monkeypatch, capsys):
    """It is stopped before each file that it writes, one after the other."""
    expected, stops = content(whole), 0
    replace = files.replace_file

    class Stopped(BaseException):
        pass

    while True:
        written = 0

        def stop(*given, stops=stops):
            nonlocal written
            written += 1
            if written > stops:  # one more file than the time before
                raise Stopped
            replace(*given)

        for module in (layout, files):
            monkeypatch.setattr(module, "replace_file", stop)
        try:
            assert run_command(capsys, *options(faulty, tmp_path / "e"))[0] == 0
            break
        except Stopped:
            stops += 1
            there = content(tmp_path / "e")
            assert not [name for name in there if name.endswith(".tmp")]
            assert there.items() <= expected.items()
            if "metadata/metadata_0004.parquet" not in there:  # all but the list of what is left out
                with pytest.raises(ValueError, match=r"lacks|holds no embeddings"):
                    Embeddings.open(tmp_path / "e")
        assert stops < 20, "it does not get on"
    assert stops > 3
    assert content(tmp_path / "e") == expected


@pytest.mark.long
def test_a_killed_process_leaves_nothing_twice_and_nothing_out(whole, faulty, tmp_path, capsys):
    program = f"""
import os, signal
from clipfast.cli import main
from clipfast.search import embed, layout
made = []
save = layout._save
def killed(array, path):
    made.append(path)
    if len(made) == 6:  # the texts of the third part, of which half a file is there
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(array, path)
layout._save = killed
main({options(faulty, tmp_path / "e")!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*_000[01].*")}
    assert len(before) == 6
    found, _ = make(capsys, faulty, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "parts are made again"
    numbers = found.metadata.column("number").to_pylist()
    assert len(numbers) == len(set(numbers)) == 210


def test_nothing_is_done_twice(whole, faulty, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*_0*")}
    with mock.patch.object(Encoder, "images", side_effect=AssertionError):
        _, said = make(capsys, faulty, whole)
    assert "holds 210 samples" in said
    assert "now: 0 samples" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "name", ["img_emb/img_emb_0001.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0003.parquet"]
)
def test_a_damaged_part_is_made_again(whole, faulty, tmp_path, capsys, caplog, name):
    make(capsys, faulty, tmp_path / "e")
    os.truncate(tmp_path / "e" / name, 300)
    make(capsys, faulty, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)
    assert f"part {name.partition('.')[0][-1]} is made again" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32"}, "precision 'fp16' there, 'fp32' now"),
        ({"part-size": 49}, "part_size 50 there, 49 now"),
        ({"images": True}, "texts True there, False now"),
        ({"metadata": "category"}, "columns None there"),
        ({"text-key": "label"}, "keys .* there"),
        ({"data": "b.tar"}, "samples 217 there, 17 now"),
        ({"model": "other"}, "digest"),
    ],
)
def test_other_options_are_not_mixed(whole, faulty, tmp_path, capsys, changes, message):
    if "data" in changes:
        changes = {"data": faulty / "b.tar"}
    if "model" in changes:
        torch.manual_seed(1)
        export_open_clip(create_model(TINY), tmp_path / "other")
        changes = {"model": f"local-dir:{tmp_path}/other"}
    before = content(whole)
    code, _, err = run_command(capsys, *options(faulty, whole, **changes))
    assert code == 2
    assert re.search(message, err)
    assert "give a new folder to --output, or remove this one" in err
    assert content(whole) == before


def test_changed_data_are_not_mixed(faulty, tmp_path, capsys):
    shard = write_shard(tmp_path / "c.tar", [sample(index) for index in range(3)])
    make(capsys, faulty, tmp_path / "e", data=shard)
    write_shard(shard, [sample(index + 1) for index in range(3)])
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "e", data=shard))
    assert (code, "stamp" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part-size": 0}, "--part-size must be at least 1"),
        ({"part-size": "-3"}, "--part-size must be at least 1"),
        ({"batch-size": "-1"}, "--batch-size must be at least 1"),
        ({"workers": "-1"}, "--workers must be at least 0"),
        ({"data": "nowhere"}, "no such folder or shard: nowhere"),
        ({"data": "empty/"}, "no images"),
        ({"model": TINY}, "has no weights of its own"),
        ({"model": f"open_clip:{TINY}"}, "has no weights of its own"),
        ({"precision": "fp8"}, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(faulty, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arguments = [f"{word}" for word in options(faulty, tmp_path / "e", **changes)]
    if changes.get("part-size") == 0:
        arguments += ["--part-size", "0"]
    code, _, err = run_command(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("e").exists()


def test_a_folder_of_something_else_is_left_alone(faulty, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    code, _, err = run_command(capsys, *options(faulty, tmp_path))
    assert (code, "holds something else (mine): give a new folder to --output" in err) == (2, True)
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "mine/e"))
    assert (code, "cannot be written: Not a directory" in err) == (2, True)
    assert content(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_said_and_work_goes_on_later(whole, faulty, tmp_path, capsys, code):
    save, calls = layout._save, []

    def failing(array, path):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(code, os.strerror(code), str(path))
        save(array, path)

    with mock.patch.object(layout, "_save", failing):
        ended, _, err = run_command(capsys, *options(faulty, tmp_path / "e"))
    assert ended == 2
    assert os.strerror(code) in err
    assert "text_emb_0001.npy" in err
    assert not list((tmp_path / "e").rglob("*.tmp"))
    make(capsys, faulty, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)


def test_two_at_once_are_refused(faulty, tmp_path, capsys):
    program = f"""
import sys
from pathlib import Path
from clipfast.training.lock import locked
with locked(Path({str(tmp_path / "e")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, _, err = run_command(capsys, *options(faulty, tmp_path / "e"))
        other.stdin.close()
    assert (code, f"{tmp_path}/e is in use by process {other.pid}" in err) == (2, True)


@pytest.mark.long
def test_ray_gives_the_same(whole, faulty, tmp_path, capsys):
    pytest.importorskip("ray")
    make(capsys, faulty, tmp_path / "e", engine="ray", workers=2)
    assert content(tmp_path / "e") == content(whole)


@pytest.mark.long
def test_a_killed_actor_of_ray_changes_nothing(whole, faulty, tmp_path, capsys, monkeypatch):
    """It is killed between the images and the texts of the third part."""
    pytest.importorskip("ray")
    from clipfast.search import ray_engine

    mark = tmp_path / "killed"

    class Killed(ray_engine.PartMaker):
        def __call__(self, batch):
            save = layout._save

            def killing(array, path):
                if "text_emb_0002" in path.name and not mark.exists():
                    path.write_bytes(b"half")
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                save(array, path)

            with mock.patch.object(layout, "_save", killing):
                return super().__call__(batch)

    monkeypatch.setattr(ray_engine, "PartMaker", Killed)
    make(capsys, faulty, tmp_path / "e", engine="ray", workers=2)
    assert mark.exists()
    assert content(tmp_path / "e") == content(whole)


def test_ray_is_asked_for_by_name(faulty, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "e", engine="ray"))
    assert (code, "--engine ray needs Ray: pip install 'clipfast[ray]'" in err) == (2, True)


def test_the_bar_counts_what_is_left(faulty, tmp_path):
    samples = Samples(f"{faulty}/b.tar")
    model = create_model(TINY).eval()
    encoder = Encoder(TINY, model, get_tokenizer(TINY), transform_of(model, uint8=True))
    work = embed.Work(encoder, samples, tmp_path, part_size=5, batch_size=2)
    work.begin()
    work.make([1], advance=lambda _: None)
    assert work.missing() == [0, 2, 3]
    done = []
    work.make([0, 3], advance=done.append)
    assert done == [2, 2, 1, 2]
    with mock.patch.object(embed_command, "progress") as shown:
        embed_command._bar(work, [0, 3], mock.Mock(is_main=True))
    assert shown.call_args.args[0] == 7
    assert dataclasses.replace(work, part_size=17).parts == [range(17)]
