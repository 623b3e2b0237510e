"""Folders of images with texts beside them: every pair is read, and a folder that changes is listed again."""

import os
import shutil

import pytest

from clipfast.data import expand_shards, identities, metadata
from clipfast.evaluate.labelled import LabelledSet
from clipfast.models.images import SampleError

from ..small_runs import picture
from .conftest import opened
from .tables import EXPECTED, PAIRS, TEXTS, pairs_of, write_csv, write_images, write_jsonl, write_side_cars


def test_folders(tmp_path):
    folder = write_side_cars(write_images(tmp_path / "photos"))
    source = opened(*expand_shards(str(folder)))
    assert pairs_of(source) == EXPECTED
    assert metadata(source.read(1)) == {"label": TEXTS[1]}
    assert (source.read(3)["__key__"], source.name(3)) == ("003", "photos, sample 3")
    # Pairs may lie in any sub-folder, under any names, beside files that belong to no pair.
    (folder / "b" / "c.d").mkdir(parents=True)
    for name, content in {
        "b/c.d/my.photo.v2.JPG": b"1", "b/c.d/my.photo.v2.txt": b"one", "b/c.d/my.photo.txt": b"no image",
        "b/é.webp": b"2", "b/é.caption": b"two", ".hidden.jpg": b"no", "b/notes": b"no", "b/.jpg": b"no",
        os.fsdecode(b"\xff.jpg"): b"3", os.fsdecode(b"\xff.txt"): b"three",
        "d/a.jpg": b"4", "d/a.JPG": b"5", "d/a.txt": b"a",  # two images share the text a.txt
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "b" / "again").symlink_to(folder)
    (folder / "broken").symlink_to("nowhere")
    (folder / "circle").symlink_to("circle")
    source = opened(*expand_shards(f"{folder}/"))
    others = [(b"3", "three"), (b"2", "two"), (b"1", "one"), (b"4", "a"), (b"5", "a")]
    assert pairs_of(source) == [*EXPECTED, *others]
    assert [source.read(number)["__key__"] for number in (25, 26)] == ["b/é", "b/c.d/my.photo.v2"]


def test_captions_of_a_folder_are_compared_as_they_are_now(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(0))
        (tmp_path / f"{name}.txt").write_text("same")
    for text, different in (("same", 1), ("else", 2), ("same", 1)):
        (tmp_path / "a.txt").write_text(text)
        assert len(set(identities(opened(*expand_shards(str(tmp_path))), "caption").tolist())) == different


def test_a_folder_with_a_table(tmp_path):
    for table, name in ((write_csv, "metadata.csv"), (write_jsonl, "metadata.jsonl")):
        path = table(write_images(tmp_path / name) / name)
        assert expand_shards(str(tmp_path / name)) == [str(path)]
        assert pairs_of(opened(path)) == EXPECTED


@pytest.mark.parametrize("change", ["remove", "rename", "add"])
def test_a_folder_that_changes_is_listed_again(tmp_path, change):
    folder = write_side_cars(write_images(tmp_path / "photos"))
    (folder / "a" / "b").mkdir(parents=True)
    before, late = (opened(*expand_shards(str(folder))) for _ in range(2))
    if change == "remove":
        (folder / "003.png").unlink()
    if change == "rename":
        (folder / "003.png").rename(folder / "zzz.png")
    if change == "add":
        (folder / "a/b/new.png").write_bytes(picture(3))
    assert before.read(0)["txt"].decode() == TEXTS[0]  # the open source keeps the list of files with which it began
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(SampleError, match=r"the shard (was replaced after|has \d+ bytes, and had)"):
        late.read(0)
    after = opened(*expand_shards(str(folder)))
    assert sum(after.sizes) == len(PAIRS) + {"remove": -1, "rename": 0, "add": 1}[change]


def test_a_folder_of_classes_has_no_texts(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name)
    for pattern in (tmp_path, f"{tmp_path}/", f"{tmp_path}*"):
        assert {image.label for image in LabelledSet(str(pattern))} == {"cat", "dog"}
    (tmp_path / "cat" / "003.txt").write_text("three")
    images = LabelledSet(str(tmp_path))
    assert [image.label for image in images] == ["three"]
    assert len(images.skipped) == 2 * len(PAIRS) - 1
