"""Batches, training and evaluation from tables and folders of images: they are those of the same pairs in shards."""

import json

import pytest

from clipfast.data import CroppedImages, Mix, Order, PairBatches, Unique, expand_shards, identities, open_shards
from clipfast.data.formats import unpacked
from clipfast.evaluation.labelled import LabelledSet
from clipfast.tokenizer import Tokenizer

from .conftest import TINY, run_command, write_shard
from .tables import PAIRS, TEXTS, write_csv, write_images, write_jsonl, write_side_cars


def batches(shard, batch_size=8, unique_by=None, index=None):
    source = open_shards(expand_shards(str(shard)), index=index)
    order = Mix([Order(source.sizes, 3)], [1], 3)
    if unique_by is not None:
        order = Unique(order, [identities(source, unique_by)], batch_size)
    return PairBatches([source], order, CroppedImages(16), Tokenizer(16), batch_size, 3, unique_by)


def test_image_files_are_counted_and_only_read_for_batches(tmp_path):
    folder = write_side_cars(write_images(tmp_path / "photos"))
    images = sum(len(data) for _, data, _ in PAIRS)
    texts = sum(len(path.read_bytes()) for path in folder.iterdir() if path.suffix != ".png")
    for shard, others in ((folder, texts), (write_csv(folder / "t.csv"), 0), (write_jsonl(folder / "t.jsonl"), 0)):
        made = batches(shard)
        (source,) = made.sources
        identities(source, "caption")
        assert source.bytes_read < images
        before = source.bytes_read
        records = sum(length for _, length in map(unpacked, source.index.extents(source.shards[0].name)))
        assert sum(made[number].bytes_read for number in range(3)) == images + others + records
        assert source.bytes_read == before + images + others + records


def test_unique_captions_of_a_table(tmp_path):
    made = batches(write_csv(write_images(tmp_path) / "t.csv"), batch_size=len(TEXTS), unique_by="caption")
    for number in range(8):
        assert len({tuple(row.tolist()) for row in made[number].texts}) == len(TEXTS)


def test_broken_rows_do_not_stop_identities(tmp_path):
    write_csv(tmp_path / "t.csv", rows=[("a.png", "a"), ("b.png", "b", "c"), ("c.png", "a"), ("d.png",), ("e.png",)])
    found = identities(open_shards([f"{tmp_path}/t.csv"]), "caption").tolist()
    assert found[0] == found[2]
    assert len(set(found)) == 4


def sources(tmp_path):
    """The same pairs in every form."""
    folder = write_side_cars(write_images(tmp_path / "photos"))
    samples = [{"png": data, "txt": text.encode()} for _, data, text in PAIRS]
    return [
        write_shard(tmp_path / "s.tar", samples), write_csv(folder / "t.csv"), write_jsonl(folder / "t.jsonl"), folder,
    ]  # fmt: skip


@pytest.mark.long
def test_training_is_the_same_from_every_source(capsys, tmp_path):
    losses = []
    for number, shard in enumerate(sources(tmp_path)):
        code, out, err = run_command(
            capsys, "train", "--train-data", shard, "--model", TINY, "--batch-size", 12, "--epochs", 1, "--workers", 0,
            "--warmup", 1, "--logs", tmp_path, "--name", number, "--log-every-n-steps", 1,
        )  # fmt: skip
        assert code == 0, err
        metrics = [json.loads(line) for line in (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in metrics if "loss" in line])
        assert json.loads(out)["skipped_pairs"] == 0
    assert len(losses[0]) == 2
    assert losses == [losses[0]] * 4


def test_evaluation_reads_every_source(tmp_path):
    tar, *others = sources(tmp_path)
    expected = [(image.image.tobytes(), image.label, image.caption) for image in LabelledSet(str(tar))]
    assert len(expected) == len(PAIRS)
    for shard in others:
        images = LabelledSet(str(shard))
        assert [(image.image.tobytes(), image.label, image.caption) for image in images] == expected
        assert images.skipped == []
    write_csv(tmp_path / "photos" / "t.csv", ("filepath", "title", "class", "kind"), rows=[("001.png", "a", "b", "c")])
    ((label, text, group),) = [
        (image.label, image.caption, image.group)
        for image in LabelledSet(f"{tmp_path}/photos/t.csv", group_by="kind", label_by="class")
    ]
    assert (label, text, group) == ("b", "a", "c")


def test_an_evaluation_names_what_is_lost(tmp_path):
    """Every lost pair is left out by a name of its own, behind those of its shard."""
    path = write_shard(tmp_path / "s.tar", [{"png": data, "txt": text.encode()} for _, data, text in PAIRS])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes([7]) * 20_000
    path.write_bytes(data)
    images = LabelledSet(f"{path}::{path}")
    read = len(list(images))
    names = [skipped.name for skipped in images.skipped if skipped.kind == "damaged shard"]
    (damage,) = open_shards([str(path)]).shards[0].damage.items()
    place, reason = damage[0].split(": ", 1)
    assert names == [f"s.tar/{place}, pair {pair + 1}" for pair in range(damage[1])] * 2
    assert names
    assert f"a pair is lost: {reason}" in [skipped.reason for skipped in images.skipped]
    assert read + len(images.skipped) >= 2 * len(PAIRS)
