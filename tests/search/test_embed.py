"""clipfast embed: the same embeddings by one process or several, also after a kill; and errors for wrong inputs."""

import contextlib
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

from clipfast import Embeddings, create_model
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.cli import embed as embed_command
from clipfast.cli.main import main
from clipfast.evaluate.encoder import Encoder
from clipfast.io import files
from clipfast.runs.lock import LOCK_NAME
from clipfast.search import embed, layout

from ..conftest import threads
from ..processes import run_ranks
from ..small_runs import output_of, refusal_of, run_command, sample, write_shard
from .embedding import TINY, content, make, options


def test_threads_and_workers_change_nothing(whole, faulty, tmp_path, capsys):
    with threads(3):
        make(capsys, faulty, tmp_path / "e", workers="2")
        assert torch.get_num_threads() == 3
    assert content(tmp_path / "e") == content(whole)


def as_rank(rank, size, arguments):
    """Run ``clipfast embed`` as one of the processes of torchrun, and return the parts that it writes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    with mock.patch.object(embed, "write_part", side_effect=embed.write_part) as written:
        assert main(arguments) == 0
    return [call.args[2] for call in written.call_args_list]


def test_ranks_share_the_parts_and_give_the_same(whole, faulty, tmp_path):
    (tmp_path / "ranks").mkdir()
    made = run_ranks(as_rank, 2, 2, options(faulty, tmp_path / "e", workers="0"), folder=tmp_path / "ranks")
    assert content(tmp_path / "e") == content(whole)
    assert made == [[0, 2, 4], [1, 3]]


def test_wherever_it_is_killed_it_goes_on(whole, faulty, tmp_path, monkeypatch, capsys):
    """``clipfast embed`` is killed once in each file that it writes, and goes on without making a part again."""
    expected, folder, replace = content(whole), tmp_path / "e", files.replace_file

    class Killed(BaseException):
        pass

    for kills in range(20):
        left = iter(range(kills))  # each attempt writes one more file than the previous attempt

        def write(path, *given, left=left):
            """Write a part of the embeddings, or only half of it before the process is killed."""
            if next(left, None) is None:
                path.with_name(f".{path.name}.tmp").write_bytes(b"half")
                raise Killed
            replace(path, *given)

        for module in (layout, files):
            monkeypatch.setattr(module, "replace_file", write)
        done = {path.stem[-4:] for path in folder.rglob("metadata_*.parquet")}
        before = {path: time for path, time in times(folder, "*_0*").items() if path.stem[-4:] in done}
        with contextlib.suppress(Killed):
            output_of(capsys, *options(faulty, folder))
            break
        assert content(folder).items() <= expected.items()
        assert times(folder, "*_0*").items() >= before.items(), "parts are made again"
        # Embeddings with the last table can be opened: they lack at most the list of left-out samples.
        if not (folder / "metadata/metadata_0004.parquet").exists():
            with pytest.raises(ValueError, match=r"lacks|holds no embeddings"):
                Embeddings.open(folder)
    assert kills > 3
    assert content(folder) == expected


def times(folder, pattern):
    """Return the modification times of files in a folder of embeddings, to tell which files are written again."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


def test_damaged_parts_are_made_again_and_others_are_not(whole, faulty, tmp_path, capsys, caplog):
    folder = shutil.copytree(whole, tmp_path / "e")
    before = times(folder, "*_0*")
    with mock.patch.object(Encoder, "images", side_effect=AssertionError):
        _, said = make(capsys, faulty, folder)
    assert re.search("210 samples.*now: 0 samples", said)
    assert times(folder, "*_0*") == before
    damaged = ["img_emb/img_emb_0001.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0003.parquet"]
    for name in damaged:
        os.truncate(folder / name, 300)
    make(capsys, faulty, folder)
    assert content(folder) == content(whole)
    assert {path.stem[-1] for path, time in times(folder, "*_0*").items() if time != before[path]} == {*"123"}
    assert all(f"part {number} is made again" in caplog.text for number in "123")


def test_other_options_models_and_data_are_not_mixed(whole, faulty, tmp_path, capsys):
    torch.manual_seed(1)
    export_open_clip(create_model(TINY), tmp_path / "other")
    shard = write_shard(tmp_path / "c.tar", [sample(index) for index in range(3)])
    make(capsys, faulty, tmp_path / "changed", data=shard)
    write_shard(shard, [sample(index + 1) for index in range(3)])
    for folder, changes, message in (
        (whole, {"precision": "fp32"}, "precision 'fp16' there, 'fp32' now"),
        (whole, {"part-size": 49}, "part_size 50 there, 49 now"),
        (whole, {"metadata": "category"}, "columns None there"),
        (whole, {"data": faulty / "b.tar"}, "samples 217 there, 17 now"),
        (whole, {"model": f"local-dir:{tmp_path}/other"}, "digest"),
        (tmp_path / "changed", {"data": shard}, "stamp"),
    ):
        before = content(folder)
        err = refusal_of(capsys, *options(faulty, folder, **changes))
        assert re.search(f"{message}.*give a new folder to --output", err)
        assert content(folder) == before


def test_bad_input_is_one_line_and_writes_nothing(faulty, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/file").touch()
    for changes, message in (
        ({"part-size": "0"}, "--part-size must be at least 1"),
        ({"workers": "-1"}, "--workers must be at least 0"),
        ({"data": "nowhere"}, "no such folder or shard: nowhere"),
        ({"data": "empty/"}, "no images"),
        ({"model": TINY}, "has no weights of its own"),
        ({"model": f"open_clip:{TINY}"}, "has no weights of its own"),
        ({"output": tmp_path / "mine"}, r"something else \(file\).* --output"),
        ({"output": tmp_path / "mine/file/e"}, "Not a directory"),
    ):
        code, _, err = run_command(capsys, *options(faulty, **{"output": tmp_path / "e"} | changes))
        assert (code, err.strip().count("\n")) == (2, 0)
        assert re.search(message, err)
    assert content(tmp_path) == {"mine/file": b""}


def test_two_at_once_are_refused(faulty, tmp_path, capsys):
    (tmp_path / "e").mkdir()
    program = "import fcntl as f, sys; x = open(sys.argv[1], 'w'); f.lockf(x, f.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", program, tmp_path / "e" / LOCK_NAME]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        code, _, err = run_command(capsys, *options(faulty, tmp_path / "e"))
        other.communicate(b"\n")
    assert (code, f"{tmp_path}/e is in use" in err) == (2, True)


@pytest.mark.long
def test_ray_gives_the_same_though_an_actor_is_killed(whole, faulty, tmp_path, capsys, monkeypatch):
    """A Ray actor of ``clipfast embed`` is killed between writing the images and the texts of the third part."""
    pytest.importorskip("ray")
    mark = tmp_path / "killed"

    class Killed(embed_command.PartMaker):
        def __call__(self, batch):
            save = layout._save

            def killing(array, path):
                """Kill the Ray actor in the middle of a part of the embeddings."""
                if "text_emb_0002" in path.name and not mark.exists():
                    path.write_bytes(b"half")
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                save(array, path)

            with mock.patch.object(layout, "_save", killing):
                return super().__call__(batch)

    monkeypatch.setattr(embed_command, "PartMaker", Killed)
    make(capsys, faulty, tmp_path / "e", engine="ray", workers=2)
    assert mark.exists()
    assert content(tmp_path / "e") == content(whole)


def test_ray_is_asked_for_by_name(faulty, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    err = refusal_of(capsys, *options(faulty, tmp_path / "e", engine="ray"))
    assert "--engine ray needs Ray: pip install 'clipfast[ray]'" in err
