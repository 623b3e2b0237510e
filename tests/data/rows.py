"""Parquet and Arrow files for tests, as the libraries img2dataset and datasets write them."""

import json
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def downloaded(count, first=0):
    """Return a table of pairs like those that img2dataset writes."""
    numbers = range(first, first + count)
    return pa.table({
        "url": [f"http://example.com/{n}" for n in numbers],
        "caption": [None if n % 10 == 3 else f"a caption {n}, été 猫" for n in numbers],
        "key": [f"{n:09d}" for n in numbers],
        "status": ["success"] * count,
        "error_message": pa.array([None] * count, pa.string()),
        "width": pa.array([24] * count, pa.int32()),
        "similarity": [float("nan") if n % 2 else 0.25 for n in numbers],
        "jpg": pa.array([None if n % 10 in (3, 5) else b"image %d" % n for n in numbers], pa.binary()),
    })  # fmt: skip


def write_parquet(path, table, rows=100):
    """Write a table of pairs as a Parquet shard, and return its name."""
    pq.write_table(table, path, row_group_size=rows)
    return str(path)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = b'{"info": {"features": {"image": {"_type": "Image"}, "captions": {"feature": {"dtype": "string"}}}}}'


def write_arrow(path, table, form="stream", rows=50):
    """Write a table of pairs as an Arrow shard, and return its name."""
    with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return str(path)


def save_to_disk(folder, counts):
    """Write a folder as ``datasets.save_to_disk`` does, with files of ``counts`` rows in batches."""
    folder.mkdir(parents=True)
    schema = pa.schema([("image", IMAGE), ("captions", pa.list_(pa.string()))], {b"huggingface": FEATURES})
    names, row = [f"data-{number:05d}-of-{len(counts):05d}.arrow" for number in range(len(counts))], 0
    for name, count in zip(names, counts, strict=True):
        images = [{"bytes": b"image %d" % n, "path": None} if n % 5 else None for n in range(row, row + count)]
        captions = [[f"a {n}", f"b {n}"] for n in range(row, row + count)]
        write_arrow(folder / name, pa.table([images, captions], schema=schema), rows=4)
        row += count
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "features": {}}))
    # state.json lists the files in reverse order of their names, and a reader must take them in the order of the list.
    state = {"_data_files": [{"filename": name} for name in reversed(names)], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return names


def fields(raw):
    """Return the metadata of a sample of a Parquet or Arrow shard."""
    return json.loads(raw["json"])


def cut(path, share):
    """Truncate a Parquet or Arrow shard to the ``share`` of its bytes at the beginning."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * share)])
