"""clipfast embed: the samples and metadata that it takes from each kind of source, such as shards and folders."""

import csv
import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from clipfast import Embeddings
from clipfast.data import Skipped
from clipfast.evaluate.encoder import Encoder
from clipfast.search import source_samples as samples_module
from clipfast.search.source_samples import Samples, table_of

from ..small_runs import picture, refusal_of, sample, write_shard
from ..train.faults import PLACES
from .embedding import make, options

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def test_features_are_those_of_a_plain_loop(whole, faulty, tmp_path, capsys):
    found, said = make(capsys, faulty, tmp_path / "e", precision="fp32")
    samples = Samples(f"{faulty}/a.tar::{faulty}/b.tar", texts=True)
    encoder = Encoder.load(f"local-dir:{faulty}/model", device="cpu")
    usable = [one for number in range(len(samples)) if not isinstance(one := samples.read(number), Skipped)]
    images = torch.cat([encoder.images(encoder.transform(one.image)[None]) for one in usable])
    texts = encoder.texts([one.caption for one in usable])
    torch.testing.assert_close((found.features, found.text_features), (images, texts), rtol=0, atol=1e-6)
    half = Embeddings.open(whole)  # ``whole`` has embeddings in float16, which is the default
    assert torch.equal(half.features, found.features.half())
    assert torch.equal(half.text_features, found.text_features.half())
    bad = sorted({*PLACES} - {PLACES[7], PLACES[8]})  # pairs with a faulty json are usable
    rows = found.metadata.to_pylist()
    assert [row["number"] for row in rows] == sorted({*range(217)}.difference(bad))
    assert rows[-1]["image_path"] == f"{faulty}/b.tar/016.png"
    expected = {"key": "001", "caption": "a green thing 1", "width": 24, "height": 24, "category": "odd"}
    assert rows[1].items() >= expected.items()
    assert json.loads(rows[1]["keywords"]) == ["green", "noise"]
    lines = list(csv.DictReader((tmp_path / "e/skipped.tsv").open(), delimiter="\t"))
    assert [int(line["number"]) for line in lines] == bad
    assert {line["kind"] for line in lines} >= {"broken image", "empty image", "huge image", "no caption"}
    assert "210 samples, 7 left out" in said


def photos(folder: Path, *names: str) -> Path:
    """Write a folder of pictures to embed, no two of which are equal."""
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(seed, size=20 + seed))
    return folder


def test_a_folder_of_pictures_needs_nothing_else(faulty, tmp_path, capsys):
    """Folders of pictures are embedded as people have them: without captions, with odd names, among other files."""
    names = ["IMG_1.JPG", '2024/day 1/it\'s "us".png', "2024/day 1/<img onerror=alert(1)>.png", "2024/b.webp"]
    folder = photos(tmp_path / "photos", *names, ".hidden/a.png")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(picture(9))
    for name in ("2024/broken.jpg", "1.heic", "3.HEIC", "day 2.tif", "README", "x.pdf"):
        (folder / name).write_bytes(b"no picture")
    found, said = make(capsys, faulty, tmp_path / "e", data=folder)
    table = found.metadata.to_pydict()
    assert {str(Path(path).relative_to(folder)) for path in table["image_path"]} == {*names, "caf?.png"}
    assert (found.text_features, table["caption"]) == (None, [None] * 5)
    assert "2024/broken: not an image" in said
    assert said.count("2 heic") == said.count("1 pdf") == 1
    of_items = Samples.of(found.about)
    # Pictures can be read even if the path is no valid UTF-8.
    again = [of_items.read(number).image for number in table["number"]]
    assert [one.size for one in again] == list(zip(table["width"], table["height"], strict=True))
    encoder = Encoder.load(f"local-dir:{faulty}/model", device="cpu")
    queries = encoder.images(torch.stack([encoder.transform(one) for one in again]))
    assert found.search(queries, 1).indices[:, 0].tolist() == [0, 1, 2, 3, 4]
    for path in folder.rglob("*.[pPwJ]*"):
        path.unlink()
    (folder / "2024/broken.jpg").unlink()
    err = refusal_of(capsys, *options(faulty, tmp_path / "none", data=folder))
    assert re.search("no images .*, but 2 heic", err)


def test_pictures_without_captions_are_not_lost_without_a_word(faulty, tmp_path, capsys):
    """If one of the first pictures has a caption, texts are embedded, and pictures without a caption are left out."""
    data = photos(tmp_path / "photos", "0.png", "1.png", "2.png")
    (data / "0.txt").write_text("a thing")
    for images, count in ((None, 1), (True, 3)):
        found, said = make(capsys, faulty, tmp_path / f"{count}", data=data, images=images)
        assert (len(found), "2 have no caption: with --images" in said) == (count, not images)


@pytest.mark.parametrize("data", ["pipe:touch done; cat {tar}", "{tar}::pi{{pe,pe}}:touch done; cat {tar}"])
def test_looking_at_embeddings_runs_no_command(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").touch()
    about = {"data": data.format(tar="a.tar"), "images": True, "texts": False, "separator": None, "columns": None}
    with pytest.raises(ValueError, match="made from the output of a command, which is not run again: pipe:touch done"):
        Samples.of({**about, "keys": {}})
    assert not (tmp_path / "done").exists()


def test_images_alone_need_no_captions_and_texts_alone_no_images(faulty, tmp_path, capsys):
    images, _ = make(capsys, faulty, tmp_path / "i", images=True)
    assert (len(images), images.text_features) == (212, None)
    assert images.metadata.column("caption").null_count == 2
    with mock.patch.object(samples_module, "decode_image", side_effect=AssertionError):
        texts, _ = make(capsys, faulty, tmp_path / "t", texts=True)
    assert (len(texts), texts.features) == (215, None)
    assert not {"image_path", "width"} & set(texts.metadata.column_names)


def test_rows_and_tables(faulty, tmp_path, capsys):
    names = [f"{number}.png" for number in range(4)]
    images = [path.read_bytes() for path in sorted(photos(tmp_path, *names).iterdir())]
    (tmp_path / "t.csv").write_text("filepath,title,stars\n" + "".join(f"{n}.png,thing {n},{n}\n" for n in range(4)))
    rows = {"jpg": images, "txt": [f"thing {n}" for n in range(4)], "stars": [0, 1, 2, 3]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    table, rows = (make(capsys, faulty, tmp_path / kind, data=tmp_path / f"t.{kind}")[0] for kind in ("csv", "parquet"))
    assert torch.equal(table.features, rows.features)
    assert torch.equal(table.text_features, rows.text_features)
    for found, paths, stars in (
        (table, [f"{tmp_path}/{name}" for name in names], ["0", "1", "2", "3"]),
        (rows, [f"{tmp_path}/t.parquet/{number:09}.jpg" for number in range(4)], [0, 1, 2, 3]),
    ):
        assert found.metadata.column("image_path").to_pylist() == paths
        assert found.metadata.column("stars").to_pylist() == stars
    chosen, _ = make(capsys, faulty, tmp_path / "none", data=tmp_path / "t.parquet", metadata=True)
    assert set(chosen.metadata.column_names) == {*samples_module.OWN}


def test_columns_have_the_types_of_their_values():
    columns = {
        "int64": [1, None, 3],
        "double": [1, 2.5, None],
        "bool": [True, None, False],
        "null": [None] * 3,
        "string": ["a", None, "\udce9"],
        "string of lists": [["é"], None, {"a": 1}],
        "string of both": [1, "a", None],
        "string of large": [2**70, 1, None],
        "string of truths": [True, 1, None],
    }
    own = {"number": 0, "key": "k", "caption": None}
    rows = [own | {name: column[row] for name, column in columns.items()} for row in range(3)]
    table = table_of(rows, with_images=False)
    assert all(str(table.schema.field(name).type) == name.split()[0] for name in columns)
    assert table.column("string of lists").to_pylist() == ['["é"]', None, '{"a": 1}']
    assert table.column("string").to_pylist() == ["a", None, "?"]
    assert table_of([]).num_rows == 0
    large = table_of([own | {"n": value} for value in (0.5, 2**53 + 1)], with_images=False)
    # The column is of numbers, so that ``--where`` can compare them.
    assert str(large.schema.field("n").type) == "double"


def test_a_part_without_a_usable_sample(faulty, tmp_path, capsys):
    shard = write_shard(tmp_path / "x.tar", [sample(0), *[sample(1, png=b"")] * 2, sample(3)])
    found, _ = make(capsys, faulty, tmp_path / "e", data=shard, **{"part-size": 1, "batch-size": None})
    assert found.metadata.column("number").to_pylist() == [0, 3]
    assert found.search(found.features, 1).indices.tolist() == [[0], [1]]
    bad = write_shard(tmp_path / "bad.tar", [sample(1, png=b"")] * 2)
    err = refusal_of(capsys, *options(faulty, tmp_path / "bad", data=bad))
    assert "not one of the 2 samples" in err


@pytest.mark.parametrize("prefix", ["", "open_clip:"])
def test_a_model_in_8_bits_finds_the_same(prefix, whole, faulty, tmp_path, capsys):
    if prefix:
        pytest.importorskip("open_clip")
    found, _ = make(capsys, faulty, tmp_path / "e", precision="fp8", model=f"{prefix}local-dir:{faulty}/model")
    exact = Embeddings.open(whole)
    assert found.features.dtype == exact.features.dtype
    assert 0.99 < torch.cosine_similarity(found.features.float(), exact.features.float()).min() < 0.99999


def test_a_model_of_open_clip_gives_the_same(whole, faulty, tmp_path, capsys):
    pytest.importorskip("open_clip")
    for weights in ({"a": torch.zeros(1)}, {"positional_embedding": torch.zeros(77, 4)}):  # of another model
        torch.save(weights, tmp_path / "w.pt")
        words = options(faulty, tmp_path / "e", model="open_clip:ViT-S-32-alt", pretrained=tmp_path / "w.pt")
        err = refusal_of(capsys, *words)
        assert "OpenCLIP does not build ViT-S-32-alt with " in err.splitlines()[-1]
    ours = Embeddings.open(whole)
    theirs, _ = make(capsys, faulty, tmp_path / "e", model=f"open_clip:local-dir:{faulty}/model")
    both = ((one.features, one.text_features) for one in (theirs, ours))
    torch.testing.assert_close(*both, rtol=0, atol=2e-3)
