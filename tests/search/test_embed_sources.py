"""clipfast embed takes the samples of each kind of source that it should, with their metadata."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings
from clipfast.data import Skipped
from clipfast.data.folders import others_in
from clipfast.data.keys import DEFAULT_KEYS
from clipfast.evaluation.encoder import Encoder
from clipfast.search import samples as samples_module
from clipfast.search.samples import Samples, table_of

from ..clip.conftest import picture, run_command, sample, write_shard
from ..clip.faults import PLACES
from .embedding import content, make, options

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("tqdm")


def test_features_are_those_of_a_plain_loop(faulty, tmp_path, capsys):
    found, said = make(capsys, faulty, tmp_path / "e", precision="fp32")
    samples = Samples(f"{faulty}/a.tar::{faulty}/b.tar", texts=True)
    encoder = Encoder.load(f"local-dir:{faulty}/model", device="cpu")
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
    assert table["image_path"][-1] == f"{faulty}/b.tar/016.png"
    assert (table["key"][3], table["width"][3], table["height"][3]) == ("003", 24, 24)
    assert (table["category"][1], json.loads(table["keywords"][1])) == ("odd", ["green", "noise"])
    assert found.about["digest"] == encoder.digest
    lines = [line.split("\t") for line in (tmp_path / "e/skipped.tsv").read_text().splitlines()]
    assert lines[0] == ["number", "name", "kind", "reason"]
    assert [int(line[0]) for line in lines[1:]] == sorted(bad)
    assert {line[2] for line in lines[1:]} >= {"broken image", "empty image", "huge image", "no caption"}
    assert "holds 210 samples, 7 left out (see " in said
    assert "left out a.tar/007: image cannot be decoded" in said


def test_half_precision_is_the_default(whole, faulty, tmp_path, capsys):
    half, exact = Embeddings.open(whole), make(capsys, faulty, tmp_path / "e", precision="fp32")[0]
    assert half.features.dtype == half.text_features.dtype == torch.float16
    assert torch.equal(half.features, exact.features.half())
    assert torch.equal(half.text_features, exact.text_features.half())


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


def test_a_folder_of_pictures_needs_nothing_else(faulty, tmp_path, capsys):
    folder = holiday(tmp_path / "photos")
    found, said = make(capsys, faulty, tmp_path / "e", data=folder)
    table = found.metadata.to_pydict()
    names = {str(Path(path).relative_to(folder)) for path in table["image_path"]}
    assert names == {
        "IMG_1.JPG", "2024/day 1/it's \"us\".png", "2024/day 1/<img onerror=alert(1)>.png", "2024/b.webp", "caf?.png",
    }  # fmt: skip
    assert found.text_features is None
    assert table["caption"] == [None] * 5
    assert "1 left out" in said
    assert "2024/broken: not an image" in said
    assert "these files were not taken: 1 pdf (images are jpg, jpeg, png, webp, gif, bmp)" in said
    of_items = Samples.of(found.about)
    for row, number in enumerate(table["number"]):  # even where the path cannot be written as text
        assert of_items.read(number).image.size == (table["width"][row], table["height"][row])
    queries = Encoder.load(f"local-dir:{faulty}/model", device="cpu")
    again = torch.stack([queries.transform(of_items.read(number).image) for number in table["number"]])
    assert found.search(queries.images(again), 1).indices[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_files_that_are_not_taken_are_counted(faulty, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "day 2").mkdir(parents=True)
    for name in ("1.png", "day 2/2.png"):
        (folder / name).write_bytes(picture(1))
    taken = ["1.txt", "1.JSON", ".DS_Store", "1.PNG"]  # what belongs to an image, or is hidden
    others = ["1.heic", "3.HEIC", "day 2/4.heic", "day 2/a.tif", "b.tiff", "c.TIFF", "alone.txt", "README", "2.json"]
    others += [f"x.{kind}" for kind in ("aa", "bb", "cc", "dd", "ee")]
    for name in [*taken, *others]:
        (folder / name).write_bytes(picture(2) if name.endswith("PNG") else b"{}")
    with mock.patch("PIL.Image.open", side_effect=AssertionError):
        said = others_in(str(folder), DEFAULT_KEYS)
    assert said == "3 heic, 2 tiff, 1 without extension, 1 aa, 1 bb, 1 cc, 1 dd, 1 ee, 3 of other kinds"
    _, told = make(capsys, faulty, tmp_path / "e", data=folder, images=True)
    assert told.count(f"clipfast embed: in {folder}/ these files were not taken: {said} (images are jpg, ") == 1
    _, told = make(capsys, faulty, tmp_path / "tar", data=f"{faulty}/b.tar")
    assert "not taken" not in told


def test_a_folder_of_other_files_says_what_they_are(faulty, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("1.heic", "2.heic", "a.tif"):
        (tmp_path / "photos" / name).touch()
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "e", data=tmp_path / "photos"))
    assert (code, "the folder has no images (jpg, jpeg, png, webp, gif, bmp), but 2 heic, 1 tif" in err) == (2, True)


def test_pictures_without_captions_are_not_lost_without_a_word(faulty, tmp_path, capsys):
    """One caption among the first pictures is enough for texts to be embedded, which costs those that have none."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "photos/0.txt").write_text("a thing")
    found, said = make(capsys, faulty, tmp_path / "e", data=tmp_path / "photos")
    assert len(found) == 1
    assert "2 have no caption: with --images (and a new --output) they are embedded too" in said
    found, said = make(capsys, faulty, tmp_path / "i", data=tmp_path / "photos", images=True)
    assert (len(found), "no caption" in said) == (3, False)


@pytest.mark.parametrize("data", ["pipe:touch done; cat {tar}", "{tar}::pi{{pe,pe}}:touch done; cat {tar}"])
def test_looking_at_embeddings_runs_no_command(faulty, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    about = {"data": data.format(tar="a.tar"), "images": True, "texts": False, "separator": None, "columns": None}
    with pytest.raises(ValueError, match="made from the output of a command, which is not run again: pipe:touch done"):
        Samples.of({**about, "keys": {}})
    assert not (tmp_path / "done").exists()


def test_images_alone_need_no_captions_and_texts_alone_no_images(faulty, tmp_path, capsys):
    images, _ = make(capsys, faulty, tmp_path / "i", images=True)
    assert images.text_features is None
    assert len(images) == 212
    assert images.metadata.column("caption").null_count == 2
    with mock.patch.object(samples_module, "decode_image", side_effect=AssertionError):
        texts, _ = make(capsys, faulty, tmp_path / "t", texts=True)
    assert texts.features is None
    assert len(texts) == 215
    assert {"image_path", "width"} & set(texts.metadata.column_names) == set()
    assert content(tmp_path / "t").keys() >= {"text_emb/text_emb_0004.npy", "metadata/metadata_0004.parquet"}


def test_rows_and_tables(faulty, tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "t.csv").write_text("filepath,title,stars\n" + "".join(f"{n}.png,thing {n},{n}\n" for n in range(4)))
    images = [picture(number) for number in range(4)]
    rows = {"jpg": images, "txt": [f"thing {n}" for n in range(4)], "stars": [0, 1, 2, 3]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    found = {kind: make(capsys, faulty, tmp_path / kind, data=tmp_path / f"t.{kind}")[0] for kind in ("csv", "parquet")}
    assert torch.equal(found["csv"].features, found["parquet"].features)
    assert torch.equal(found["csv"].text_features, found["parquet"].text_features)
    assert found["csv"].metadata.column("image_path").to_pylist() == [f"{tmp_path}/{n}.png" for n in range(4)]
    assert found["csv"].metadata.column("stars").to_pylist() == ["0", "1", "2", "3"]
    assert found["parquet"].metadata.column("stars").to_pylist() == [0, 1, 2, 3]
    assert found["parquet"].metadata.column("image_path")[1].as_py() == f"{tmp_path}/t.parquet/000000001.jpg"
    chosen, _ = make(capsys, faulty, tmp_path / "chosen", data=tmp_path / "t.parquet", metadata="stars")
    assert chosen.metadata.column_names[-1] == "stars"
    none, _ = make(capsys, faulty, tmp_path / "none", data=tmp_path / "t.parquet", metadata=True)
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


def test_a_part_without_a_usable_sample(faulty, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", [sample(0), *[sample(1, png=b"")] * 2, sample(3)])
    found, _ = make(capsys, faulty, tmp_path / "e", data=shard, **{"part-size": 1, "batch-size": None})
    assert found.metadata.column("number").to_pylist() == [0, 3]
    assert found.search(found.features, 1).indices.tolist() == [[0], [1]]
    bad = write_shard(tmp_path / "bad.tar", [sample(1, png=b"")] * 2)
    code, _, err = run_command(capsys, *options(faulty, tmp_path / "bad", data=bad))
    assert (code, "not one of the 2 samples" in err) == (2, True)


def test_a_model_of_open_clip_gives_the_same(whole, faulty, tmp_path, capsys):
    pytest.importorskip("open_clip")
    ours = Embeddings.open(whole)
    theirs, _ = make(capsys, faulty, tmp_path / "e", model=f"open_clip:local-dir:{faulty}/model")
    torch.testing.assert_close(theirs.features, ours.features, rtol=0, atol=2e-3)
    torch.testing.assert_close(theirs.text_features, ours.text_features, rtol=0, atol=2e-3)
