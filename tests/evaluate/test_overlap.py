"""``clipfast eval overlap``: planted copies are found and nothing else, figures by their definitions, wrong inputs."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.evaluate.encoder import Encoder, PixelEncoder
from clipfast.evaluate.features import LabelledFeatures, encode_set
from clipfast.evaluate.labelled import LabelledSet
from clipfast.evaluate.overlap_pairs import EDITS, contamination, pair, planted
from clipfast.evaluate.significance import binomial_tail, clopper_pearson

from ..small_runs import sample, write_shard
from .eval_commands import check_page, check_refused, evaluated, printed, save_model, split, wrong_inputs


def some_features(features, digests):
    """Return features of a test or training set with digests of the pixels, for the test of overlap."""
    count = len(features)
    found = LabelledFeatures(features, ["a"] * count, [("a",)] * count, [""] * count)
    found.digests = [str(digest).encode() for digest in digests]
    return found


def test_pairs_are_the_best_of_the_whole_matrix_and_equal_pixels_come_first():
    test, train = (F.normalize(torch.randn(count, 8), dim=1) for count in (50, 70))
    digests = list(range(100, 170))
    digests[20] = digests[40] = 7  # training images 20 and 40 have the pixels of test image 7
    found = pair(some_features(test, range(50)), some_features(train, digests))
    scores = test @ train.T
    expected = scores.argmax(1)
    expected[7] = 20
    assert torch.equal(found.places, expected)
    assert found.same.tolist() == [number == 7 for number in range(50)]
    assert found.similarity[7] == 1.0 > scores[7, 20]
    torch.testing.assert_close(found.similarity.where(~found.same, 0), scores.max(1).values.where(~found.same, 0))
    assert found.overlap(scores.max(1).values[3].item())[3]  # a similarity that equals the threshold counts as overlap
    assert pair(some_features(2 * test, range(50)), some_features(train, digests)).similarity.max() == 1.0


def test_accuracy_with_and_without_near_duplicates():
    right = torch.tensor([True] * 9 + [False] + [True] * 30 + [False] * 60)
    overlap = torch.arange(100) < 10
    found = contamination(right, overlap)
    assert found["metrics"] == {
        "overlap": 0.1, "acc1": 0.39, "acc1_overlap": 0.9, "acc1_clean": 30 / 90,
        "acc1_all_minus_clean": pytest.approx(0.39 - 30 / 90), "p_value": binomial_tail(9, 10, 30 / 90),
    }  # fmt: skip
    assert found["intervals"]["acc1_overlap"] == clopper_pearson(9, 10, 0.995)
    # The test has one tail: a lower accuracy on near duplicates is no sign that the model remembers them.
    assert contamination(~right, overlap)["metrics"]["p_value"] > 0.99
    nothing, everything = (contamination(right, overlap & False | both)["metrics"] for both in (False, True))
    assert (nothing["acc1_overlap"], nothing["p_value"], nothing["acc1_all_minus_clean"]) == (None, None, 0.0)
    assert (everything["acc1_clean"], everything["acc1_all_minus_clean"]) == (None, None)


def drawing(seed, size=48):
    """Return a picture of blurred spots for the test of overlap; only pictures of the same seed look alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def png(image):
    """Return a picture of the overlap tests as a PNG file."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_edits_change_images_of_every_size():
    image = drawing(0)
    for edit in EDITS.values():
        assert edit(image).tobytes() != image.tobytes()
        assert all(min(edit(image.resize(size)).size) >= 1 for size in ((1, 1), (2, 5), (3, 3), (48, 31)))


FOUND = ("jpeg 75", "half size", "darker")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Write 40 test images in 5 classes for the test of overlap, and a training set of 60 other images and 8 copies."""
    folder = tmp_path_factory.mktemp("this&that")
    tests = [drawing(number) for number in range(40)]
    write_shard(
        folder / "test.tar", [sample(n, png=png(image), txt=f"thing {n % 5}".encode()) for n, image in enumerate(tests)]
    )
    copies = [EDITS[FOUND[n % 4]](image) if n % 4 < 3 else image for n, image in enumerate(tests[:8])]
    images = [*(drawing(1000 + number) for number in range(60)), *copies]
    shard = [{"png": png(image), "txt": f"<i>{n}</i>".encode()} for n, image in enumerate(images)]
    write_shard(folder / "train.tar", [*shard, {"png": b"broken", "txt": b"x"}])
    save_model(folder / "w.pt")
    return folder


MODEL = "--model ViT-T-8-32 --pretrained {sets}/w.pt --data {sets}/test.tar "


def command(sets, words, **folders):
    """Return the arguments of ``clipfast eval overlap`` for the test sets."""
    return split("overlap " + MODEL + "--train-data {sets}/train.tar " + words, sets=sets, **folders)


def test_the_share_that_edits_would_be_found_is_what_planting_them_gives(sets, tmp_path):
    """The recall that ``planted`` computes for an edit equals the overlap with a training set of edited test images."""
    images, detector = LabelledSet(f"{sets}/test.tar"), PixelEncoder()
    (test,) = encode_set([detector], images)
    (train,) = encode_set([detector], LabelledSet(f"{sets}/train.tar"))
    pairs = pair(test, train)
    rows = planted(detector, images, test, pairs, [0.95], 40)
    for row, (name, edit) in zip(rows, EDITS.items(), strict=True):
        shard = write_shard(tmp_path / "p.tar", [{"png": png(edit(drawing(n))), "txt": b"x"} for n in range(40)])
        again = pair(test, encode_set([detector], LabelledSet(str(shard)))[0])
        own = again.overlap(0.95) & (again.places == torch.arange(40))
        assert (row["edit"], row["recall"]) == (name, own.double().mean().item())
    found = {row["edit"]: (row["recall"], row["precision"]) for row in rows}
    assert [found[name] for name in FOUND] == [(1.0, 1.0)] * 3
    assert found["mirror"] == (0.0, None)  # thumbnails do not recognise a mirrored image
    # Only one image is planted. The other near duplicates, here seven, are found too, and lower the precision.
    (one, *_) = planted(detector, images, test, pairs, [0.95], 1)
    assert (one["images"], one["recall"], one["precision"]) == (1, 1.0, 1 / 8)


def test_a_picture_of_one_colour_is_like_no_other():
    assert PixelEncoder().images(torch.full((1, 3, 16, 16), 9, dtype=torch.uint8)).abs().max() == 0


@pytest.mark.long
def test_what_was_planted_is_found_and_nothing_else(sets, tmp_path, capsys, monkeypatch):
    # Only the test set has labels, so training images lack them.
    kept = "--by pixels --features {at}/f --label-by label "
    outputs = "--json {at}/r.json --write {at}/pairs.tsv --html {at}/p.html --plot {at}/p.svg --table "
    out, err = printed(capsys, *command(sets, kept + outputs + "--plant 7 --pairs 12", at=tmp_path))
    assert "left out train.tar/068" in err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["images"] == {"train": 68, "all": 40, "overlap": 8, "clean": 32, "same_pixels": 2}
    assert [row["edit"] for row in found["planted"] if row["threshold"] == 0.95] == list(EDITS)
    rows = [list(row.values()) for row in csv.DictReader((tmp_path / "pairs.tsv").open(), delimiter="\t")]
    assert {tuple(row[:2]) for row in rows[:8]} == {(f"test.tar/{n:03}", f"train.tar/{60 + n:03}") for n in range(8)}
    similarity = [float(row[2]) for row in rows]
    assert (len(rows), similarity) == (40, sorted(similarity, reverse=True))
    assert similarity[7] > 0.95 > similarity[8] + 0.1
    assert {row[0] for row in rows if row[3] == "1"} == {"test.tar/003", "test.tar/007"}
    assert re.search(r"\n0\.95 +8 +20\.0%", out)
    assert "<svg" in (tmp_path / "p.svg").read_text()
    page = (tmp_path / "p.html").read_text()
    check_page(page, 2 * (8 + 3), 48, 24)  # an edited copy has half the size of its image
    assert not re.search("<i>|this&that", page)
    assert re.search("this&amp;that.*&lt;i&gt;", page, re.DOTALL)
    closeness = re.findall(r"<figcaption>(equal pixels|[0-9.]+): thing", page)
    assert closeness == sorted(closeness, reverse=True)
    monkeypatch.setattr(Encoder, "images", None)  # the test fails if an image is encoded again
    assert evaluated(capsys, *command(sets, kept, at=tmp_path))["metrics"] == found["metrics"]


WRONG = {
    "--threshold 1.5": "--threshold must be from -1 to 1, got 1.5",
    "--threshold nan": "--threshold must be from -1 to 1, got nan",
    "--train-data {sets}/test.tar": "each image would be a duplicate of itself",
    "--write {tmp}/p.txt": "--output {tmp}/p.txt: the name must end in one of .csv, .tsv",
    "--train-data nowhere.tar": "no such shard: nowhere.tar",
}


@wrong_inputs(WRONG)
def test_wrong_inputs(words, message, sets, tmp_path, capsys):
    check_refused(capsys, tmp_path, message, *command(sets, ""), words=words, sets=sets)
