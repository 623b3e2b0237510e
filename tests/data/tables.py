"""Pairs for tests of data, and functions that write them as CSV files, JSON lines and folders."""

import csv
import io
import json
from pathlib import Path

import numpy as np

from clipfast.data import CroppedImages, Keys, PairBatches, Unique, caption, expand_shards, identities, open_shards
from clipfast.data.samples import image_bytes
from clipfast.models.tokenizer import Tokenizer

from ..small_runs import picture
from .conftest import ordered

NO_IMAGE = Keys(images=())
TEXTS = [
    "a cat",
    'a "quoted" cat, with a comma',
    "two\nlines\r\nand a tab\t",
    "é 世界 🙂",
    "semi;colon | bar",
    "a\u2028b",
]
PAIRS = [(f"{index:03d}.png", picture(index), text) for index, text in enumerate(TEXTS * 4)]


def write_images(folder: Path) -> Path:
    """Write the image files that the shards in CSV and JSON lines name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, _ in PAIRS:
        (folder / name).write_bytes(data)
    return folder


def write_csv(path: Path, header=("filepath", "title"), separator=",", end="\n", start="", rows=None) -> Path:
    """Write a CSV shard of pairs."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end)
    writer.writerow(header)
    writer.writerows([(name, text) for name, _, text in PAIRS] if rows is None else rows)
    path.write_bytes((start + stream.getvalue()).encode())
    return path


def write_jsonl(path: Path, image="file_name", text="caption", many=False) -> Path:
    """Write a shard of pairs in JSON lines."""
    lines = [json.dumps({image: name, text: [words] if many else words}) for name, _, words in PAIRS]
    path.write_text("\n".join(lines))
    return path


def write_side_cars(folder: Path) -> Path:
    """Write a .txt file, and for some a .json file, beside each image of a folder that is read as a shard of pairs."""
    for index, (name, _, text) in enumerate(PAIRS):
        (folder / name).with_suffix(".txt").write_text(text, newline="")
        if index % 2:
            (folder / name).with_suffix(".json").write_text(json.dumps({"label": text}))
    return folder


def pairs_of(source):
    """Read all samples of a data source in random order; return image and caption of each, in the source's order."""
    found = {}
    for number in np.random.default_rng(0).permutation(sum(source.sizes)).tolist():
        raw = source.read(number)
        found[number] = image_bytes(raw), caption(raw)
    return [found[number] for number in sorted(found)]


EXPECTED = [(data, text.strip()) for _, data, text in PAIRS]


def batches(shards, batch_size=8, seed=3, unique_by=None, **options):
    """Return batches of small images from shards in a shuffled order, with training augmentation."""
    source = open_shards(expand_shards(str(shards)))
    order = ordered(source, seed)
    if unique_by is not None:
        order = Unique(order, [identities(source, unique_by)], batch_size)
    return PairBatches(
        [source], order, CroppedImages(16), Tokenizer(16), batch_size, seed, unique_by=unique_by, **options
    )


def texts_of(batch):
    """Return the token ids of a training batch, as tuples that can be counted."""
    return [tuple(row.tolist()) for row in batch.texts]
