"""CLIP_benchmark's offline layout: sets that are found in a folder, incomplete sets, and samples that are left out."""

import io
import pickle

import numpy as np
import pytest

from clipfast.evaluate.offline_layout import COLLECTIONS, KNOWN, find_sets

from ..small_runs import write_shard
from .benchmark_sets import coded, row_of, write_set


def test_every_set_is_found_under_its_name(tmp_path):
    kinds = {
        "vtab/cifar10": "classification", "imagenet-a": "classification", "my-own": "classification",
        "vtab/my-own": "classification", "flickr8k": "retrieval", "voc2007_multilabel": "multilabel",
    }  # fmt: skip
    for name, kind in kinds.items():
        folder = tmp_path / f"wds_{name.replace('/', '-')}"
        write_set(folder, images=4, shards=1, kind=kind, splits=("test", "train"), draw=coded)
    write_set(tmp_path / "others", images=4, draw=coded)
    found = find_sets(tmp_path)
    assert {one.name: one.kind for one in found.sets} == kinds
    assert found.problems == []
    assert set(found.missing) == set(KNOWN) - kinds.keys()
    (cifar,) = find_sets(tmp_path, ["wds/vtab/cifar10"]).sets
    assert sorted(cifar.shards) == ["test", "train"]
    assert cifar.classnames == tuple(f"thing {number}" for number in range(7))
    assert cifar.templates == ("a photo of a {}.", "{}")
    assert [image.label for image in cifar.images("test")] == ["0", "1", "2", "3"]


def test_sets_and_groups_of_sets_are_chosen_by_name(tmp_path):
    for name in ("vtab-cifar10", "vtab-dtd", "flickr8k"):
        write_set(tmp_path / f"wds_{name}", images=2, draw=coded)
    for wanted in ("vtab/dtd", "vtab-dtd", "wds_vtab-dtd", "wds/vtab/dtd"):
        found = find_sets(tmp_path, [wanted])
        assert ([one.name for one in found.sets], found.missing) == (["vtab/dtd"], []), wanted
    found = find_sets(tmp_path, ["vtab", "flickr8k", "flickr8k"])
    assert [one.name for one in found.sets] == ["vtab/dtd", "flickr8k"]
    assert found.missing == [name for name in COLLECTIONS["vtab"] if name != "vtab/dtd"]
    assert (len(COLLECTIONS["vtab"]), len(COLLECTIONS["vtab+"])) == (19, 36)
    with pytest.raises(ValueError, match=r"has none of the sets mnist; it has flickr8k, vtab/cifar10, vtab/dtd"):
        find_sets(tmp_path, ["mnist"])


BROKEN = {
    "a shard is missing": ("test/1.tar", None, "test/1.tar is missing: 1 of the 2 shards"),
    "too few shards are said": ("test/nshards.txt", b"1\n", "says 1 shards, but 1.tar is there too"),
    "no number of shards": ("test/nshards.txt", b"two", "holds no number from 1: 'two'"),
    "no shards": ("test/nshards.txt", b"0", "holds no number from 1: '0'"),
    "no split": ("test/nshards.txt", None, "test/nshards.txt is missing"),
    "no classnames": ("classnames.txt", None, "classnames.txt is missing"),
    "empty classnames": ("classnames.txt", b"\n\n", "classnames.txt is empty"),
    "no place": ("zeroshot_classification_templates.txt", b"a {c}\na {}", "template 'a {}' has no {c}"),
    "unknown type": ("dataset_type.txt", b"captions", "dataset_type.txt says 'captions'"),
    "not UTF-8": ("classnames.txt", b"\xff\xfe", "codec can't decode"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_set_is_said_and_others_are_found(name, tmp_path):
    folder = write_set(tmp_path / "wds_vtab-dtd", images=4, draw=coded)
    write_set(tmp_path / "wds_mnist", images=2, draw=coded)
    file, content, message = BROKEN[name]
    (folder / file).unlink(missing_ok=True) if content is None else (folder / file).write_bytes(content)
    found = find_sets(tmp_path)
    assert [one.name for one in found.sets] == ["mnist"]
    ((left_out, reason),) = found.problems
    assert left_out == "vtab/dtd"
    assert message in reason


def pickled():
    """Return labels of a CLIP_benchmark set as a pickle, which must not be loaded."""
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}, 2], dtype=object), allow_pickle=True)
    return stream.getvalue()


# For each kind of set: label and captions of a good sample, its files beside the image, and such files of bad samples.
SAMPLES = {
    "classification": ("12", ("12",), {"cls": b" 12\n"}, {}, {"cls": b"-1"}, {"cls": b"cat"}),
    "multilabel": (
        "1010", ("1010",), {"npy": row_of({0, 2}, 4)}, {"npy": pickled()}, {"npy": b""}, {"cls": b"1"},
        {"npy": pickle.dumps([1, 0])}, {"npy": row_of({0}, 4).replace(b")", b"(")},
    ),
    "retrieval": (
        "", ("ein Häuschen", "", "b"), {"txt": "ein Häuschen\n\nb".encode()}, {"txt": b""}, {"txt": b"\xff"}, {},
    ),
}  # fmt: skip
REASONS = {
    "classification": ("no .cls, only webp", "no number from 0: b'-1'", "b'cat'"),
    "multilabel": ("cannot be read", "cannot be read", "no .npy, only cls, webp", "cannot be read", "cannot be read"),
    "retrieval": ("its text is empty", "not UTF-8", "no .txt, only webp"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_that_cannot_be_used_are_named(kind, tmp_path):
    folder = write_set(tmp_path / "wds_x", images=4, kind=kind, shards=1, draw=coded)
    label, captions, *samples = SAMPLES[kind]
    images = [*({"webp": coded(1), **more} for more in samples), samples[0], {"webp": b"broken", **samples[0]}]
    write_shard(folder / "test" / "0.tar", images)
    images = find_sets(tmp_path).sets[0].images("test")
    (good,) = images
    assert (good.label, good.captions) == (label, captions)
    for skipped, reason in zip(images.skipped, (*REASONS[kind], "no image", "not an image"), strict=True):
        assert reason in skipped.reason


def test_folders_that_hold_no_sets(tmp_path):
    with pytest.raises(ValueError, match=r"has no folder wds_NAME$"):
        find_sets(tmp_path)
    folder = write_set(tmp_path / "wds_x", images=2, draw=coded)
    with pytest.raises(ValueError, match=r"no set is whole; first: x: dev/nshards.txt is missing"):
        find_sets(tmp_path, split="dev")
    with pytest.raises(ValueError, match="wds_x is one set: give the folder that it is in, and its name by --sets"):
        find_sets(folder)
