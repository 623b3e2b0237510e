"""clipfast embed: the same content however it is made, interrupted or shared; and clear words where it cannot be."""

import dataclasses
import errno
import json
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
from clipfast.data import Skipped
from clipfast.evaluation.encoder import Encoder
from clipfast.factory import get_tokenizer, transform_of
from clipfast.ranks import run_ranks
from clipfast.search import embed, embed_command, layout
from clipfast.search import samples as samples_module
from clipfast.search.samples import Samples, table_of

from ..clip.conftest import picture, run_command, sample, write_shard
from ..clip.faults import PLACES, faulty_samples

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tqdm")

TINY = "ViT-T-8-32"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model and a set of pairs of which some cannot be used, in two shards."""
    folder = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    export_open_clip(create_model(TINY), folder / "model")
    write_shard(folder / "a.tar", [*faulty_samples(), *(sample(index) for index in range(20))])
    write_shard(folder / "b.tar", [sample(index, png=picture(100 + index)) for index in range(17)])
    return folder


def options(home: Path, output: Path, **changes) -> list[str]:
    """Arguments of a command; one that is None is left out, and one that is True has no value."""
    given = {"model": f"local-dir:{home}/model", "data": f"{home}/a.tar::{home}/b.tar", "output": str(output)}
    given |= {"part-size": "50", "batch-size": "16"} | changes
    words = [[f"--{name}", *([] if value is True else [str(value)])] for name, value in given.items() if value]
    return ["embed", *(word for both in words for word in both)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its lock, by its name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


def make(capsys, home: Path, output: Path, **changes) -> tuple[Embeddings, str]:
    code, out, err = run_command(capsys, *options(home, output, **changes))
    assert code == 0, err
    return Embeddings.open(output), out + err


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """What one process makes that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "e"
    from clipfast.cli import main

    assert main(options(home, output)) == 0
    return output


def test_features_are_those_of_a_plain_loop(home, tmp_path, capsys):
    found, said = make(capsys, home, tmp_path / "e", precision="fp32")
    samples = Samples(f"{home}/a.tar::{home}/b.tar", texts=True)
    encoder = Encoder.load(f"local-dir:{home}/model", device="cpu")
    everything = [samples.read(number) for number in range(len(samples))]
    usable = [one for one in everything if not isinstance(one, Skipped)]
    images = torch.cat([encoder.images(encoder.transform(one.image)[None]) for one in usable])
    texts = encoder.texts([one.caption for one in usable])
    torch.testing.assert_close(found.features, images, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text_features, texts, rtol=0, atol=1e-6)
    table = found.metadata.to_pydict()
    bad = {*PLACES} - {PLACES[7], PLACES[8]}  # a pair is of use without a json
    assert table["number"] == sorted(set(range(217)) - bad)
    assert table["caption"][:2] == ["a red thing 0", "a green thing 1"]
    assert table["image_path"][-1] == f"{home}/b.tar/016.png"
    assert (table["key"][3], table["width"][3], table["height"][3]) == ("003", 24, 24)
    assert (table["category"][1], json.loads(table["keywords"][1])) == ("odd", ["green", "noise"])
    assert found.about["digest"] == encoder.digest
    lines = [line.split("\t") for line in (tmp_path / "e/skipped.tsv").read_text().splitlines()]
    assert lines[0] == ["number", "name", "kind", "reason"]
    assert [int(line[0]) for line in lines[1:]] == sorted(bad)
    assert {line[2] for line in lines[1:]} >= {"broken image", "empty image", "huge image", "no caption"}
    assert "holds 210 samples, 7 left out (see " in said
    assert "left out a.tar/007: image cannot be decoded" in said


def test_half_precision_is_the_default(whole, home, tmp_path, capsys):
    half, exact = Embeddings.open(whole), make(capsys, home, tmp_path / "e", precision="fp32")[0]
    assert half.features.dtype == half.text_features.dtype == torch.float16
    assert torch.equal(half.features, exact.features.half())
    assert torch.equal(half.text_features, exact.text_features.half())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_threads_and_workers_change_nothing(whole, home, tmp_path, capsys, threads, workers):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        make(capsys, home, tmp_path / "e", workers=str(workers))
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
def test_any_number_of_ranks_gives_the_same(whole, home, tmp_path, size):
    (tmp_path / "ranks").mkdir()
    made = run_ranks(as_rank, size, size, options(home, tmp_path / "e", workers="0"), folder=tmp_path / "ranks")
    assert content(tmp_path / "e") == content(whole)
    assert made == [list(range(5))[rank::size] for rank in range(size)]


def test_wherever_it_is_stopped_it_goes_on(whole, home, tmp_path, monkeypatch, capsys):
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
            assert run_command(capsys, *options(home, tmp_path / "e"))[0] == 0
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
def test_a_killed_process_leaves_nothing_twice_and_nothing_out(whole, home, tmp_path, capsys):
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
main({options(home, tmp_path / "e")!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*_000[01].*")}
    assert len(before) == 6
    found, _ = make(capsys, home, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "parts are made again"
    numbers = found.metadata.column("number").to_pylist()
    assert len(numbers) == len(set(numbers)) == 210


def test_nothing_is_done_twice(whole, home, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*_0*")}
    with mock.patch.object(Encoder, "images", side_effect=AssertionError):
        _, said = make(capsys, home, whole)
    assert "holds 210 samples" in said
    assert "now: 0 samples" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    "name", ["img_emb/img_emb_0001.npy", "text_emb/text_emb_0002.npy", "metadata/metadata_0003.parquet"]
)
def test_a_damaged_part_is_made_again(whole, home, tmp_path, capsys, caplog, name):
    make(capsys, home, tmp_path / "e")
    os.truncate(tmp_path / "e" / name, 300)
    make(capsys, home, tmp_path / "e")
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
def test_other_options_are_not_mixed(whole, home, tmp_path, capsys, changes, message):
    if "data" in changes:
        changes = {"data": home / "b.tar"}
    if "model" in changes:
        torch.manual_seed(1)
        export_open_clip(create_model(TINY), tmp_path / "other")
        changes = {"model": f"local-dir:{tmp_path}/other"}
    before = content(whole)
    code, _, err = run_command(capsys, *options(home, whole, **changes))
    assert code == 2
    assert re.search(message, err)
    assert "give a new folder to --output, or remove this one" in err
    assert content(whole) == before


def test_changed_data_are_not_mixed(home, tmp_path, capsys):
    shard = write_shard(tmp_path / "c.tar", [sample(index) for index in range(3)])
    make(capsys, home, tmp_path / "e", data=shard)
    write_shard(shard, [sample(index + 1) for index in range(3)])
    code, _, err = run_command(capsys, *options(home, tmp_path / "e", data=shard))
    assert (code, "stamp" in err) == (2, True)


def holiday(folder: Path) -> Path:
    """A folder of pictures as people have them: in folders, without captions, with names and files of all kinds."""
    names = ["IMG_1.JPG", '2024/day 1/it\'s "us".png', "2024/day 1/<img onerror=alert(1)>.png", "2024/b.webp"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed, size=20 + seed))
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(picture(9))
    (folder / "2024/broken.jpg").write_bytes(b"no picture")
    (folder / "notes.pdf").write_bytes(b"no picture")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/a.png").write_bytes(picture(8))
    return folder


def test_a_folder_of_pictures_needs_nothing_else(home, tmp_path, capsys):
    folder = holiday(tmp_path / "photos")
    found, said = make(capsys, home, tmp_path / "e", data=folder)
    table = found.metadata.to_pydict()
    names = {str(Path(path).relative_to(folder)) for path in table["image_path"]}
    assert names == {
        "IMG_1.JPG", "2024/day 1/it's \"us\".png", "2024/day 1/<img onerror=alert(1)>.png", "2024/b.webp", "caf?.png",
    }  # fmt: skip
    assert found.text_features is None
    assert table["caption"] == [None] * 5
    assert "1 left out" in said
    assert "2024/broken: not an image" in said
    of_items = Samples.of(found.about)
    for row, number in enumerate(table["number"]):  # even where the path cannot be written as text
        assert of_items.read(number).image.size == (table["width"][row], table["height"][row])
    queries = Encoder.load(f"local-dir:{home}/model", device="cpu")
    again = torch.stack([queries.transform(of_items.read(number).image) for number in table["number"]])
    assert found.search(queries.images(again), 1).indices[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("data", ["pipe:touch done; cat {tar}", "{tar}::pi{{pe,pe}}:touch done; cat {tar}"])
def test_looking_at_embeddings_runs_no_command(home, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    about = {"data": data.format(tar="a.tar"), "images": True, "texts": False, "separator": None, "columns": None}
    with pytest.raises(ValueError, match="made from the output of a command, which is not run again: pipe:touch done"):
        Samples.of({**about, "keys": {}})
    assert not (tmp_path / "done").exists()


def test_images_alone_need_no_captions_and_texts_alone_no_images(home, tmp_path, capsys):
    images, _ = make(capsys, home, tmp_path / "i", images=True)
    assert images.text_features is None
    assert len(images) == 212
    assert images.metadata.column("caption").null_count == 2
    with mock.patch.object(samples_module, "decode_image", side_effect=AssertionError):
        texts, _ = make(capsys, home, tmp_path / "t", texts=True)
    assert texts.features is None
    assert len(texts) == 215
    assert {"image_path", "width"} & set(texts.metadata.column_names) == set()
    assert content(tmp_path / "t").keys() >= {"text_emb/text_emb_0004.npy", "metadata/metadata_0004.parquet"}


def test_rows_and_tables(home, tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "t.csv").write_text("filepath,title,stars\n" + "".join(f"{n}.png,thing {n},{n}\n" for n in range(4)))
    images = [picture(number) for number in range(4)]
    rows = {"jpg": images, "txt": [f"thing {n}" for n in range(4)], "stars": [0, 1, 2, 3]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    found = {kind: make(capsys, home, tmp_path / kind, data=tmp_path / f"t.{kind}")[0] for kind in ("csv", "parquet")}
    assert torch.equal(found["csv"].features, found["parquet"].features)
    assert torch.equal(found["csv"].text_features, found["parquet"].text_features)
    assert found["csv"].metadata.column("image_path").to_pylist() == [f"{tmp_path}/{n}.png" for n in range(4)]
    assert found["csv"].metadata.column("stars").to_pylist() == ["0", "1", "2", "3"]
    assert found["parquet"].metadata.column("stars").to_pylist() == [0, 1, 2, 3]
    assert found["parquet"].metadata.column("image_path")[1].as_py() == f"{tmp_path}/t.parquet/000000001.jpg"
    chosen, _ = make(capsys, home, tmp_path / "chosen", data=tmp_path / "t.parquet", metadata="stars")
    assert chosen.metadata.column_names[-1] == "stars"
    none, _ = make(capsys, home, tmp_path / "none", data=tmp_path / "t.parquet", metadata=True)
    assert set(none.metadata.column_names) == set(samples_module.OWN)


def test_columns_have_the_types_of_their_values():
    values = {
        "whole": [1, None, 3], "mixed": [1, 2.5, None], "truth": [True, None, False], "text": ["a", None, "\udce9"],
        "list": [["é"], None, {"a": 1}], "both": [1, "a", None], "huge": [2**70, 1, None], "nothing": [None] * 3,
        "truths": [True, 1, None],
    }  # fmt: skip
    own = {"number": 0, "key": "k", "caption": None}
    rows = [own | {name: column[row] for name, column in values.items()} for row in range(3)]
    table = table_of(rows, with_images=False)
    assert {name: str(table.schema.field(name).type) for name in values} == {
        "whole": "int64", "mixed": "double", "truth": "bool", "text": "string", "list": "string", "both": "string",
        "huge": "string", "nothing": "null", "truths": "string",
    }  # fmt: skip
    assert table.column("list").to_pylist() == ['["é"]', None, '{"a": 1}']
    assert table.column("text").to_pylist() == ["a", None, "?"]
    assert table_of([]).num_rows == 0


def test_a_part_without_a_usable_sample(home, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", [sample(0), *[sample(1, png=b"")] * 2, sample(3)])
    found, _ = make(capsys, home, tmp_path / "e", data=shard, **{"part-size": 1, "batch-size": None})
    assert found.metadata.column("number").to_pylist() == [0, 3]
    assert found.search(found.features, 1).indices.tolist() == [[0], [1]]
    bad = write_shard(tmp_path / "bad.tar", [sample(1, png=b"")] * 2)
    code, _, err = run_command(capsys, *options(home, tmp_path / "bad", data=bad))
    assert (code, "not one of the 2 samples" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part-size": 0}, "--part-size must be at least 1"),
        ({"part-size": "-3"}, "--part-size must be at least 1"),
        ({"batch-size": "-1"}, "--batch-size must be at least 1"),
        ({"workers": "-1"}, "--workers must not be negative"),
        ({"data": "nowhere"}, "no such shard: nowhere"),
        ({"data": "empty/"}, "no images"),
        ({"model": TINY}, "has no weights of its own"),
        ({"model": f"open_clip:{TINY}"}, "has no weights of its own"),
        ({"precision": "fp8"}, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(home, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arguments = [f"{word}" for word in options(home, tmp_path / "e", **changes)]
    if changes.get("part-size") == 0:
        arguments += ["--part-size", "0"]
    code, _, err = run_command(capsys, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not Path("e").exists()


def test_a_folder_of_something_else_is_left_alone(home, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    code, _, err = run_command(capsys, *options(home, tmp_path))
    assert (code, "holds something else (mine): give a new folder to --output" in err) == (2, True)
    code, _, err = run_command(capsys, *options(home, tmp_path / "mine/e"))
    assert (code, "cannot be written: Not a directory" in err) == (2, True)
    assert content(tmp_path) == {"mine": b"mine"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_said_and_work_goes_on_later(whole, home, tmp_path, capsys, code):
    save, calls = layout._save, []

    def failing(array, path):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(code, os.strerror(code), str(path))
        save(array, path)

    with mock.patch.object(layout, "_save", failing):
        ended, _, err = run_command(capsys, *options(home, tmp_path / "e"))
    assert ended == 2
    assert os.strerror(code) in err
    assert "text_emb_0001.npy" in err
    assert not list((tmp_path / "e").rglob("*.tmp"))
    make(capsys, home, tmp_path / "e")
    assert content(tmp_path / "e") == content(whole)


def test_two_at_once_are_refused(home, tmp_path, capsys):
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
        code, _, err = run_command(capsys, *options(home, tmp_path / "e"))
        other.stdin.close()
    assert (code, f"{tmp_path}/e is in use by process {other.pid}" in err) == (2, True)


def test_a_model_of_open_clip_gives_the_same(whole, home, tmp_path, capsys):
    pytest.importorskip("open_clip")
    ours = Embeddings.open(whole)
    theirs, _ = make(capsys, home, tmp_path / "e", model=f"open_clip:local-dir:{home}/model")
    torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=2e-3)
    torch.testing.assert_close(theirs.text_features, ours.text_features, rtol=0, atol=2e-3)


@pytest.mark.long
def test_ray_gives_the_same(whole, home, tmp_path, capsys):
    pytest.importorskip("ray")
    make(capsys, home, tmp_path / "e", engine="ray", workers=2)
    assert content(tmp_path / "e") == content(whole)


def test_ray_is_asked_for_by_name(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run_command(capsys, *options(home, tmp_path / "e", engine="ray"))
    assert (code, "--engine ray needs Ray: pip install 'clipfast[ray]'" in err) == (2, True)


def test_the_bar_counts_what_is_left(home, tmp_path):
    samples = Samples(f"{home}/b.tar")
    model = create_model(TINY).eval()
    encoder = Encoder(TINY, model, get_tokenizer(TINY), transform_of(model, uint8=True))
    work = embed.Work(encoder, samples, tmp_path, part_size=5, batch_size=2)
    work.begin()
    work.make([1], advance=lambda _: None)
    assert work.missing() == [0, 2, 3]
    done = []
    work.make([0, 3], advance=done.append)
    assert done == [2, 2, 1, 2]
    with embed_command._bar(work, [0, 3], mock.Mock(is_main=True)) as advance:
        assert advance.__self__.total == 7
    assert dataclasses.replace(work, part_size=17).parts == [range(17)]
