"""``clipfast eval overlap``: what is planted is found and nothing else, figures by their definitions, wrong inputs."""

import csv
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast import create_model, ranks
from clipfast.evaluation.encoder import Encoder
from clipfast.evaluation.features import LabelledFeatures, encode_set
from clipfast.evaluation.labelled import LabelledSet
from clipfast.evaluation.pixels import PixelEncoder
from clipfast.evaluation.significance import binomial_tail, clopper_pearson
from clipfast.evaluation.tasks.overlap_edits import EDITS, planted
from clipfast.evaluation.tasks.overlap_pairs import contamination, pair
from clipfast.ranks import run_ranks

from .conftest import run_command, sample, write_shard
from .test_retrieval_task import as_rank

ranks.PRELOAD.append("clipfast.evaluation.encoder")


def some_features(features, digests):
    count = len(features)
    found = LabelledFeatures(features, ["a"] * count, [("a",)] * count, [""] * count)
    found.digests = [str(digest).encode() for digest in digests]
    return found


def test_pairs_are_the_best_of_the_whole_matrix_and_equal_pixels_come_first():
    test, train = (F.normalize(torch.randn(count, 8), dim=1) for count in (50, 70))
    digests = list(range(100, 170))
    digests[20] = digests[40] = 7  # the pixels of test image 7
    found = pair(some_features(test, range(50)), some_features(train, digests))
    scores = test @ train.T
    expected = scores.argmax(1)
    expected[7] = 20
    assert torch.equal(found.places, expected)
    assert found.same.tolist() == [number == 7 for number in range(50)]
    assert found.similarity[7] == 1.0 > scores[7, 20]
    others = torch.arange(50) != 7
    torch.testing.assert_close(found.similarity[others], scores.max(1).values[others])
    assert found.overlap(scores.max(1).values[3].item())[3]  # the threshold itself is inside
    again = pair(some_features(2 * test, range(50)), some_features(train, digests))
    assert again.similarity.max() == 1.0
    with pytest.raises(ValueError, match="features contain NaN"):
        pair(some_features(test * math.nan, range(50)), some_features(train, digests))


def test_accuracy_with_and_without_near_duplicates():
    right = torch.tensor([True] * 9 + [False] + [True] * 30 + [False] * 60)
    overlap = torch.arange(100) < 10
    found = contamination(right, overlap)
    assert found["images"] == {"all": 100, "overlap": 10, "clean": 90}
    assert found["metrics"] == {
        "overlap": 0.1, "acc1": 0.39, "acc1_overlap": 0.9, "acc1_clean": 30 / 90,
        "acc1_all_minus_clean": pytest.approx(0.39 - 30 / 90), "p_value": binomial_tail(9, 10, 30 / 90),
    }  # fmt: skip
    assert found["metrics"]["p_value"] < 1e-3
    assert found["intervals"]["acc1_overlap"] == clopper_pearson(9, 10, 0.995)
    # one tail: near duplicates that are harder are no sign of memory
    assert contamination(~right, overlap)["metrics"]["p_value"] > 0.99


def test_overlap_without_an_effect_is_significant_as_rarely_as_it_should_be():
    refused = 0
    for _ in range(60):
        p = contamination(torch.rand(400) < 0.3, torch.rand(400) < 0.2)["metrics"]["p_value"]
        refused += p < 0.1
    assert 1 <= refused <= 16


def test_a_perfect_model_and_one_by_chance():
    overlap = torch.arange(4000) % 4 == 0
    perfect = contamination(torch.ones(4000, dtype=torch.bool), overlap)["metrics"]
    assert [perfect[name] for name in ("acc1", "acc1_overlap", "acc1_clean", "p_value")] == [1.0] * 4
    chance = contamination(torch.rand(4000) < 0.1, overlap)["metrics"]
    assert all(abs(chance[name] - 0.1) < 0.05 for name in ("acc1", "acc1_overlap", "acc1_clean"))


def test_subsets_without_images():
    right = torch.tensor([True, False])
    nothing = contamination(right, torch.tensor([False, False]))
    assert (nothing["metrics"]["acc1_overlap"], nothing["metrics"]["p_value"]) == (None, None)
    assert (nothing["metrics"]["overlap"], nothing["metrics"]["acc1_all_minus_clean"]) == (0.0, 0.0)
    everything = contamination(right, torch.tensor([True, True]))
    assert (everything["metrics"]["acc1_clean"], everything["metrics"]["acc1_all_minus_clean"]) == (None, None)
    assert everything["intervals"]["acc1_clean"] is None


def drawing(seed, size=48):
    """A picture of blurred spots: what belongs together looks alike, and nothing else does."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_edits_change_images_of_every_size():
    for size in ((1, 1), (2, 5), (3, 3), (48, 31)):
        image = Image.new("RGB", size, (200, 30, 60))
        assert all(min(edit(image).size) >= 1 for edit in EDITS.values())
    image = drawing(0)
    assert all(edit(image).tobytes() != image.tobytes() for edit in EDITS.values())
    assert EDITS["crop 1/32"](Image.new("RGB", (320, 64))).size == (300, 60)
    assert EDITS["half size"](image).size == (24, 24)


FOUND = ("jpeg 75", "half size", "darker")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """40 test images in 5 classes. The training set has copies of each of the first 8, and 60 other images."""
    folder = tmp_path_factory.mktemp("this&that")
    tests = [drawing(number) for number in range(40)]
    write_shard(
        folder / "test.tar", [sample(n, png=png(image), txt=f"thing {n % 5}".encode()) for n, image in enumerate(tests)]
    )
    copies = [EDITS[FOUND[n % 4]](image) if n % 4 < 3 else image for n, image in enumerate(tests[:8])]
    images = [*(drawing(1000 + number) for number in range(60)), *copies]
    shard = [{"png": png(image), "txt": f"<i>{n}</i>".encode()} for n, image in enumerate(images)]
    write_shard(folder / "train.tar", [*shard, {"png": b"broken", "txt": b"x"}])
    torch.manual_seed(0)
    torch.save(create_model("ViT-T-8-32").state_dict(), folder / "w.pt")
    return folder


def arguments(folder, *more):
    given = ["--model", "ViT-T-8-32", "--pretrained", folder / "w.pt", "--data", folder / "test.tar"]
    return ["eval", "overlap", *map(str, (*given, "--train-data", folder / "train.tar", *more))]


def test_what_was_planted_is_found_and_nothing_else(sets, tmp_path, capsys):
    outputs = ["--json", tmp_path / "r.json", "--write", tmp_path / "pairs.tsv", "--table"]
    code, out, err = run_command(capsys, *arguments(sets, "--by", "pixels", *outputs))
    assert code == 0, err
    assert "left out train.tar/068: not an image" in err
    found = json.loads((tmp_path / "r.json").read_text())
    counts = {"train": 68, "all": 40, "overlap": 8, "clean": 32, "same_pixels": 2}
    assert (found["images"], found["skipped_images"]) == (counts, {"train": 1, "test": 0})
    rows = list(csv.reader((tmp_path / "pairs.tsv").open(), delimiter="\t"))
    assert rows[0] == ["test_image", "train_image", "similarity", "same_pixels"]
    assert {tuple(row[:2]) for row in rows[1:9]} == {(f"test.tar/{n:03}", f"train.tar/{60 + n:03}") for n in range(8)}
    similarity = [float(row[2]) for row in rows[1:]]
    assert len(rows) == 41
    assert similarity == sorted(similarity, reverse=True)
    assert similarity[7] > 0.95 > similarity[8] + 0.1
    assert {row[0] for row in rows if row[3] == "1"} == {"test.tar/003", "test.tar/007"}
    assert "2 have equal pixels" in out
    assert re.search(r"\n0\.95 +8 +20\.0%", out)


def test_a_folder_of_classes_against_a_table(sets, tmp_path, capsys):
    for number, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        drawing(number).save(tmp_path / "photos" / name / "x.png")
        EDITS["darker"](drawing(number + 1)).save(tmp_path / f"{number}.jpg", quality=95)
    lines = [f"{number}.jpg,a text" for number in range(3)]
    (tmp_path / "train.csv").write_text("\n".join(["filepath,title", *lines]))
    where = ["--data", tmp_path / "photos", "--train-data", tmp_path / "train.csv", "--write", tmp_path / "pairs.csv"]
    code, out, err = run_command(capsys, *arguments(sets, *where, "--by", "pixels"))
    assert code == 0, err
    assert json.loads(out)["images"] == {"train": 3, "all": 3, "overlap": 2, "clean": 1, "same_pixels": 0}
    rows = list(csv.reader((tmp_path / "pairs.csv").open()))[1:3]
    assert {tuple(row[:2]) for row in rows} == {
        (str(tmp_path / "photos/dog/x.png"), "train.csv/0.jpg"),
        (str(tmp_path / "photos/emu/x.png"), "train.csv/1.jpg"),
    }


def test_parquet_files_are_compared_as_tar_files_are(sets, tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("test", "train"):
        images = list(LabelledSet(f"{sets}/{name}.tar"))
        rows = [{"image": png(item.image), "caption": item.caption} for item in images]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    where = ["--data", tmp_path / "test.parquet", "--train-data", tmp_path / "train.parquet"]
    found, expected = (
        json.loads(run_command(capsys, *arguments(sets, *given, "--by", "pixels", "--plant", 5))[1])
        for given in (where, [])
    )
    same = ("images", "metrics", "by_threshold", "planted")
    assert [found[key] for key in same] == [expected[key] for key in same]


def test_the_share_that_edits_would_be_found_is_what_planting_them_gives(sets, tmp_path):
    """The report says in one pass what a training set with these images would say."""
    images, detector = LabelledSet(f"{sets}/test.tar"), PixelEncoder()
    (test,) = encode_set([detector], images)
    (train,) = encode_set([detector], LabelledSet(f"{sets}/train.tar"))
    pairs = pair(test, train)
    rows = planted(detector, images, test, pairs, [0.8, 0.95], 40)
    assert [(row["edit"], row["threshold"]) for row in rows] == [(edit, at) for edit in EDITS for at in (0.8, 0.95)]
    for row in rows:
        shard = write_shard(
            tmp_path / "p.tar", [{"png": png(EDITS[row["edit"]](drawing(n))), "txt": b"x"} for n in range(40)]
        )
        again = pair(test, encode_set([detector], LabelledSet(str(shard)))[0])
        own = again.overlap(row["threshold"]) & (again.places == torch.arange(40))
        assert row["recall"] == own.double().mean().item(), row
    rows = [row for row in rows if row["threshold"] == 0.95]
    recall = {row["edit"]: row["recall"] for row in rows}
    assert all(recall[name] == 1.0 for name in FOUND)
    assert recall["mirror"] == 0.0  # pixels do not see it
    assert next(row["precision"] for row in rows if row["edit"] == "mirror") is None
    assert {row["precision"] for row in rows if row["recall"]} == {1.0}
    half = planted(detector, images, test, pairs, [0.95], 20)
    drawn = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:20]
    elsewhere = 8 - sum(int(place) < 8 for place in drawn)
    assert 0 < elsewhere < 8
    assert half[0] == {
        "threshold": 0.95,
        "edit": "jpeg 75",
        "images": 20,
        "recall": 1.0,
        "precision": 20 / (20 + elsewhere),
    }


def test_what_looks_like_a_planted_image_counts_as_wrong(tmp_path):
    """Of ten pairs of test images that look alike ten images are planted; the like of each is marked with it."""
    images = [edit(drawing(number)) for number in range(10) for edit in (EDITS["darker"], EDITS["half size"])]
    samples = [{"png": png(image), "txt": b"x"} for image in images]
    data, detector = LabelledSet(str(write_shard(tmp_path / "t.tar", samples))), PixelEncoder()
    (test,) = encode_set([detector], data)
    train = some_features(detector.images(torch.stack([detector.transform(drawing(99))])), ["x"])
    drawn = set(torch.randperm(20, generator=torch.Generator().manual_seed(0))[:10].tolist())
    marked = drawn | {number ^ 1 for number in drawn}
    assert 10 < len(marked) < 20
    row = planted(detector, data, test, pair(test, train), [0.95], 10)[0]
    assert (row["recall"], row["precision"]) == (1.0, 10 / len(marked))


def test_thumbnails_compare_pixels_and_not_brightness():
    detector = PixelEncoder()
    image = drawing(3)
    variants = [image, EDITS["darker"](image), image.resize((200, 90)), drawing(4), Image.new("RGB", (9, 9), "red")]
    features = detector.images(torch.stack([detector.transform(one) for one in variants]))
    scores = features @ features[0]
    assert (scores[:3] > 0.99).all()
    assert scores[3:].abs().max() < 0.6
    assert detector.images(torch.full((1, 3, 16, 16), 9, dtype=torch.uint8)).abs().max() == 0
    with pytest.raises(ValueError, match="pixels are compared with pixels"):
        detector.tokenizer(["a"])


@pytest.mark.long
def test_everything_at_once(sets, tmp_path, capsys, monkeypatch):
    outputs = ["--json", tmp_path / "r.json", "--html", tmp_path / "p.html", "--plot", tmp_path / "p.svg"]
    kept = ["--features", tmp_path / "f", "--label-by", "label", "--threshold", "0.9", "--templates", "simple"]
    code, out, err = run_command(capsys, *arguments(sets, *kept, *outputs, "--plant", 7, "--pairs", 12))
    assert code == 0, err  # the training data have no label
    found = json.loads(out)
    assert found == json.loads((tmp_path / "r.json").read_text())
    assert (found["task"], found["dataset"], found["language"]) == ("train_test_overlap", f"{sets}/test.tar", "en")
    assert (found["by"], found["threshold"], found["templates"]) == ("model", 0.9, "simple")
    assert found["images"]["overlap"] + found["images"]["clean"] == 40
    counts = [row["images"] for row in found["by_threshold"]]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == found["images"]["same_pixels"] == 2
    assert [row["edit"] for row in found["planted"] if row["threshold"] == 0.9] == list(EDITS)
    assert "<svg" in (tmp_path / "p.svg").read_text()
    page = (tmp_path / "p.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<script|https?://|<link|<i>", page)
    assert "&lt;i&gt;" in page
    assert "this&amp;that" in page
    assert "this&that" not in page
    assert 2 < page.count('<div class="pair">') == page.count("<figure") / 2 <= 12
    closeness = re.findall(r"<figcaption>(equal pixels|[0-9.]+): thing", page)
    assert closeness == sorted(closeness, reverse=True)
    assert closeness[0] == "equal pixels"
    monkeypatch.setattr(Encoder, "images", None)  # nothing is encoded again
    code, out, err = run_command(capsys, *arguments(sets, *kept))
    assert code == 0, err
    assert json.loads(out)["metrics"] == found["metrics"]


WRONG = {
    "threshold": (["--threshold", "1.5"], "--threshold must be from -1 to 1, got 1.5"),
    "threshold is not a number": (["--threshold", "nan"], "--threshold must be from -1 to 1, got nan"),
    "one set": (["--train-data", "{sets}/test.tar"], "each image would be a duplicate of itself"),
    "format": (["--write", "{tmp}/p.txt"], "--output {tmp}/p.txt: the name must end in one of .csv, .tsv"),
    "nowhere": (["--write", "nowhere/p.csv"], "no folder nowhere to write p.csv in"),
    "no training data": (["--train-data", "nowhere.tar"], "no such shard: nowhere.tar"),
    "no training image": (
        ["--train-data", "{tmp}/bad.tar"],
        "not one of the 1 images of the evaluation set can be used",
    ),
    "no label": (["--label-by", "breed"], "sample has no 'breed' in its json"),
    "names": (["--classnames", "imagenet"], "1000 class names for 5 classes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, sets, tmp_path, capsys):
    write_shard(tmp_path / "bad.tar", [sample(0, png=b"broken")])
    words, message = WRONG[name]
    words = [word.format(tmp=tmp_path, sets=sets) for word in words]
    code, out, err = run_command(capsys, *arguments(sets, *words))
    assert (code, out) == (2, "")
    assert message.format(tmp=tmp_path) in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


@pytest.mark.long
def test_three_ranks_give_what_one_gives(sets, tmp_path, capsys):
    """Also of eval bias. With 64 images a batch the test set is one block, so that two ranks have none of it."""
    (tmp_path / "added.tsv").write_text("crime\tthief\nanimal\tgorilla\n")
    (tmp_path / "queries.txt").write_text("a doctor\na thing\n")
    commands = [arguments(sets, "--batch-size", size, "--by", by) for size, by in ((8, "pixels"), (64, "model"))]
    lists = ["--added-labels", tmp_path / "added.tsv", "--queries", tmp_path / "queries.txt", "--k", 9]
    bias = [*lists, "--group-by", "category", "--min-count", 5, "--threshold", 0.02]
    for size in (8, 64):
        given = [
            "--model",
            "ViT-T-8-32",
            "--pretrained",
            sets / "w.pt",
            "--data",
            sets / "test.tar",
            "--batch-size",
            size,
        ]
        commands.append(["eval", "bias", *map(str, (*given, *bias))])
    alone = []
    for words in commands:
        code, out, err = run_command(capsys, *words)
        assert code == 0, err
        alone.append((0, out, ""))
    assert run_ranks(as_rank, 3, commands, folder=tmp_path) == [alone, *[[(0, "", "")] * 4] * 2]
