"""Folders of images with texts beside them, or a table: every pair is read back, also after the folder has changed."""

import os
import shutil

import pytest

from clipfast.data import IndexCache, caption, expand_shards, identities, metadata, open_shards
from clipfast.data.samples import image_bytes
from clipfast.evaluation.labelled import LabelledSet
from clipfast.images import SampleError

from .conftest import picture
from .tables import EXPECTED, PAIRS, TEXTS, pairs_of, write_csv, write_images, write_jsonl, write_side_cars


def test_folders(tmp_path):
    folder = write_side_cars(write_images(tmp_path / "photos"))
    source = open_shards(expand_shards(str(folder)))
    assert pairs_of(source) == EXPECTED
    assert metadata(source.read(1)) == {"label": TEXTS[1]}
    assert source.read(3)["__key__"] == "003"
    assert source.name(3) == "photos, sample 3"
    # its files are in any depth, called in any way, and beside others
    (folder / "b" / "c.d").mkdir(parents=True)
    for name, content in {
        "b/c.d/my.photo.v2.JPG": b"1", "b/c.d/my.photo.v2.txt": b"one", "b/c.d/my.photo.txt": b"no image",
        "b/é.webp": b"2", "b/é.caption": b"two", ".hidden.jpg": b"no", "b/notes": b"no", "b/.jpg": b"no",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"3")
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"three")
    (folder / "b" / "again").symlink_to(folder)
    (folder / "broken").symlink_to("nowhere")
    (folder / "circle").symlink_to("circle")
    source = open_shards(expand_shards(f"{folder}/"))
    assert pairs_of(source) == [*EXPECTED, (b"3", "three"), (b"2", "two"), (b"1", "one")]
    assert [source.read(number)["__key__"] for number in (25, 26)] == ["b/é", "b/c.d/my.photo.v2"]


def test_images_whose_names_differ_in_case_share_a_text(tmp_path):
    for name, content in {"a.jpg": b"1", "a.JPG": b"2", "a.png": b"3", "a.txt": b"a", "b.JPG": b"4"}.items():
        (tmp_path / name).write_bytes(content)
    source = open_shards(expand_shards(str(tmp_path)))
    assert [image_bytes(source.read(number)) for number in range(source.sizes[0])] == [b"1", b"2", b"4"]
    assert [caption(source.read(number)) for number in range(2)] == ["a", "a"]


def test_captions_of_a_folder_are_compared_as_they_are_now(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(0))
        (tmp_path / f"{name}.txt").write_text("same")
    for text, different in (("same", 1), ("else", 2), ("same", 1)):
        (tmp_path / "a.txt").write_text(text)
        assert len(set(identities(open_shards(expand_shards(str(tmp_path))), "caption").tolist())) == different


def test_a_folder_with_a_table(tmp_path):
    for number, table in enumerate((write_csv, write_jsonl)):
        folder = write_images(tmp_path / str(number))
        path = table(folder / f"metadata.{'jsonl' if number else 'csv'}")
        assert expand_shards(str(folder)) == [str(path)]
        assert pairs_of(open_shards([str(path)])) == EXPECTED


@pytest.mark.parametrize("change", ["add", "remove", "rename", "deep"])
def test_a_folder_that_changes_is_listed_again(tmp_path, change):
    folder = write_side_cars(write_images(tmp_path / "photos"))
    (folder / "a" / "b").mkdir(parents=True)
    before, late = (open_shards(expand_shards(str(folder)), index=IndexCache(tmp_path / "cache")) for _ in range(2))
    if change == "remove":
        (folder / "003.png").unlink()
    if change == "rename":
        (folder / "003.png").rename(folder / "zzz.png")
    if change in ("add", "deep"):
        (folder / ("a/b/new.png" if change == "deep" else "new.png")).write_bytes(picture(3))
    assert before.read(0)["txt"].decode() == TEXTS[0]  # by the list that the run began with
    shutil.rmtree(tmp_path / "cache" / "shards")
    with pytest.raises(SampleError, match=r"the shard (was replaced after|has \d+ bytes, and had)"):
        late.read(0)
    after = open_shards(expand_shards(str(folder)), index=before.index)
    assert sum(after.sizes) == len(PAIRS) + {"remove": -1, "rename": 0, "add": 1, "deep": 1}[change]


def test_a_folder_of_classes_has_no_texts(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name)
    for pattern in (tmp_path, f"{tmp_path}/", f"{tmp_path}*"):
        assert {image.label for image in LabelledSet(str(pattern))} == {"cat", "dog"}
    (tmp_path / "cat" / "003.txt").write_text("three")
    images = LabelledSet(str(tmp_path))
    assert [image.label for image in images] == ["three"]
    assert len(images.skipped) == 2 * len(PAIRS) - 1
