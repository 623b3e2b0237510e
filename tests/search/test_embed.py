"""clipfast embed: the same content however it is made, interrupted or shared; and clear words where it cannot be."""

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings, create_model, files
from clipfast.checkpoint import export_open_clip
from clipfast.cli import main
from clipfast.evaluation.encoder import Encoder
from clipfast.ranks import run_ranks
from clipfast.search import embed, layout

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
    """Run the command as one of the processes of torchrun, and return the parts that it writes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    with mock.patch.object(embed, "write_part", side_effect=embed.write_part) as written:
        assert main(arguments) == 0
    return [call.args[2] for call in written.call_args_list]


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_ranks_gives_the_same(whole, faulty, tmp_path, size):
    (tmp_path / "ranks").mkdir()
    made = run_ranks(as_rank, size, size, options(faulty, tmp_path / "e", workers="0"), folder=tmp_path / "ranks")
    assert content(tmp_path / "e") == content(whole)
    assert made == [list(range(5))[rank::size] for rank in range(size)]


def test_wherever_it_is_stopped_it_goes_on(whole, faulty, tmp_path, monkeypatch, capsys):
    """It is stopped before each file that it writes, one after the other."""
    expected, folder, replace = content(whole), tmp_path / "e", files.replace_file

    class Stopped(BaseException):
        pass

    for stops in range(20):
        left = iter(range(stops))  # one more file than the time before

        def stop(*given, left=left):
            if next(left, None) is None:
                raise Stopped
            replace(*given)

        for module in (layout, files):
            monkeypatch.setattr(module, "replace_file", stop)
        with contextlib.suppress(Stopped):
            assert run_command(capsys, *options(faulty, folder))[0] == 0
            break
        assert not list(folder.rglob("*.tmp"))
        assert content(folder).items() <= expected.items()
        if not (folder / "metadata/metadata_0004.parquet").exists():  # else only the list of what is left out lacks
            with pytest.raises(ValueError, match=r"lacks|holds no embeddings"):
                Embeddings.open(folder)
    assert stops > 3
    assert content(folder) == expected


def times(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


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
    before = times(tmp_path / "e", "*_000[01].*")
    assert len(before) == 6
    make(capsys, faulty, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)
    assert times(tmp_path / "e", "*_000[01].*") == before, "parts are made again"


def test_nothing_is_done_twice(whole, faulty, capsys):
    before = times(whole, "*_0*")
    with mock.patch.object(Encoder, "images", side_effect=AssertionError):
        _, said = make(capsys, faulty, whole)
    assert re.search("210 samples.*now: 0 samples", said)
    assert times(whole, "*_0*") == before


@pytest.mark.parametrize(
    "name", ["img_emb/img_emb_0001.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0003.parquet"]
)
def test_a_damaged_part_is_made_again(whole, faulty, tmp_path, capsys, caplog, name):
    shutil.copytree(whole, tmp_path / "e")
    os.truncate(tmp_path / "e" / name, 300)
    make(capsys, faulty, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)
    assert f"part {Path(name).stem[-1]} is made again" in caplog.text


def test_other_options_models_and_data_are_not_mixed(whole, faulty, tmp_path, capsys):
    torch.manual_seed(1)
    export_open_clip(create_model(TINY), tmp_path / "other")
    before = content(whole)
    for changes, message in (
        ({"precision": "fp32"}, "precision 'fp16' there, 'fp32' now"),
        ({"part-size": 49}, "part_size 50 there, 49 now"),
        ({"images": True}, "texts True there, False now"),
        ({"metadata": "category"}, "columns None there"),
        ({"text-key": "label"}, "keys .* there"),
        ({"data": faulty / "b.tar"}, "samples 217 there, 17 now"),
        ({"model": f"local-dir:{tmp_path}/other"}, "digest"),
    ):
        code, _, err = run_command(capsys, *options(faulty, whole, **changes))
        assert code == 2
        assert re.search(f"{message}.*give a new folder to --output", err)
        assert content(whole) == before


def test_changed_data_are_not_mixed(faulty, tmp_path, capsys):
    shard = write_shard(tmp_path / "c.tar", [sample(index) for index in range(3)])
    make(capsys, faulty, tmp_path / "e", data=shard)
    write_shard(shard, [sample(index + 1) for index in range(3)])
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "e", data=shard))
    assert (code, "stamp" in err) == (2, True)


def test_bad_input_is_one_line_and_writes_nothing(faulty, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for changes, message in (
        ({"part-size": "0"}, "--part-size must be at least 1"),
        ({"batch-size": "-1"}, "--batch-size must be at least 1"),
        ({"workers": "-1"}, "--workers must be at least 0"),
        ({"data": "nowhere"}, "no such folder or shard: nowhere"),
        ({"data": "empty/"}, "no images"),
        ({"model": TINY}, "has no weights of its own"),
        ({"model": f"open_clip:{TINY}"}, "has no weights of its own"),
        ({"precision": "fp8"}, "invalid choice"),
    ):
        code, _, err = run_command(capsys, *options(faulty, tmp_path / "e", **changes))
        assert (code, err.strip().count("\n")) == (2, 0)
        assert message in err
        assert not Path("e").exists()


def test_a_folder_of_something_else_is_left_alone(faulty, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    for output, message in (("", r"something else \(mine\).* --output"), ("mine/e", "Not a directory")):
        code, _, err = run_command(capsys, *options(faulty, tmp_path / output))
        assert code == 2
        assert re.search(message, err)
    assert content(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_said_and_work_goes_on_later(whole, faulty, tmp_path, capsys, code):
    save, left = layout._save, iter(range(3))

    def failing(array, path):
        if next(left, None) is None:
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
