"""clipfast.Embeddings: a list of features with a table, in memory and in a folder."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from clipfast import Embeddings
from clipfast.kernels import reference
from clipfast.search import layout

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = {
    "image_path": ["a.png", "b.png", "c's.png", "d.png"],
    "caption": ["A cat", "a dog, asleep", None, "two cats"],
    "width": [640, 32, 256, None],
}


def unit(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1).to(dtype)


def saved(path, rows: int = 25, part_size: int = 10, **options) -> Embeddings:
    options = {"features": unit(rows), "about": {"model": "tiny"}} | options
    embeddings = Embeddings(**options)
    embeddings.save(path, part_size=part_size)
    return embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_gives_back_what_was_saved(tmp_path, dtype):
    features, texts = unit(25, dtype=dtype), unit(25, seed=1, dtype=dtype)
    table = {"key": [str(row) for row in range(25)], "width": list(range(25))}
    Embeddings(features, table, text_features=texts, about={"model": "tiny"}).save(tmp_path / "e", part_size=10)
    found = Embeddings.open(tmp_path / "e")
    assert len(found) == 25
    assert torch.equal(found.features, features)
    assert torch.equal(found.text_features, texts)
    assert found.metadata.to_pydict() == table
    assert found.about == {"model": "tiny"}
    files = sorted(str(path.relative_to(tmp_path / "e")) for path in (tmp_path / "e").rglob("*.*"))
    kinds = {"img_emb": "npy", "metadata": "parquet", "text_emb": "npy"}
    parts = [f"{kind}/{kind}_000{part}.{suffix}" for kind, suffix in kinds.items() for part in range(3)]
    assert files == sorted(["about.json", *parts])


def test_plain_readers_read_the_folder(tmp_path):
    saved(tmp_path / "e")
    arrays = [np.load(path) for path in sorted((tmp_path / "e/img_emb").glob("*.npy"))]
    assert np.array_equal(np.concatenate(arrays), unit(25).numpy())
    tables = [parquet.read_table(path) for path in sorted((tmp_path / "e/metadata").glob("*.parquet"))]
    assert pyarrow.concat_tables(tables).column("key").to_pylist() == [str(row) for row in range(25)]


def test_a_folder_without_our_note_is_opened(tmp_path):
    saved(tmp_path / "e")
    (tmp_path / "e/about.json").unlink()
    assert len(Embeddings.open(tmp_path / "e")) == 25
    # as clip-retrieval names parts of a set that it expects to have ten
    for path in (tmp_path / "e").rglob("*_000?.*"):
        path.rename(path.with_name(path.name.replace("_000", "_1")))
    assert torch.equal(Embeddings.open(tmp_path / "e").features, unit(25))


def test_parts_are_mapped_and_not_read(tmp_path):
    saved(tmp_path / "e", part_size=100)
    features = Embeddings.open(tmp_path / "e").features
    features[0] = 7  # which nobody else sees
    assert torch.equal(Embeddings.open(tmp_path / "e").features, unit(25))


def test_more_parts_than_four_digits_count_are_in_order(tmp_path):
    names = [layout.part_path(tmp_path, "img_emb", number, 10_001).name for number in (2, 9_999, 10_000)]
    assert names == sorted(names)
    (tmp_path / "img_emb").mkdir()
    for number in (9_999, 10_000):
        layout.part_path(tmp_path, "img_emb", number).write_bytes(b"")
    assert sorted(layout._numbered(tmp_path, "img_emb")) == [9_999, 10_000]


@pytest.mark.parametrize("part_size", [1, 7, 25])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_search_is_exact_whatever_the_parts(tmp_path, part_size, k):
    items = unit(25)
    items[20] = items[3]  # a tie between parts
    saved(tmp_path / "e", part_size=part_size, features=items)
    query = torch.cat([items[3:4], unit(4, seed=2)])
    found = Embeddings.open(tmp_path / "e").search(query, k)
    scores, indices = reference.top_k(query, items, k)
    torch.testing.assert_close(found.scores, scores)
    assert torch.equal(found.indices, indices)
    assert found.indices[0, 0] == 3


def test_search_of_one_query_and_of_texts():
    texts = unit(4, seed=5)
    embeddings = Embeddings(unit(4), COLUMNS, text_features=texts)
    assert embeddings.search(texts[2], 1, kind="text").indices.tolist() == [[2]]
    assert embeddings.search(unit(4)[1].double(), 1).indices.tolist() == [[1]]


def test_search_finds_only_what_may_be_found():
    items = unit(4)
    embeddings = Embeddings(items, COLUMNS)
    every = [set(row) for row in embeddings.search(items, 4).indices.tolist()]
    assert every == [{0, 1, 2, 3}] * 4
    for where in ("width >= 256", torch.tensor([True, False, True, False]), np.array([1, 0, 1, 0], bool)):
        found = embeddings.search(items, 4, where=where)
        assert all({*row[:2]} == {0, 2} and row[2:] == [-1, -1] for row in found.indices.tolist())
        assert found.scores[:, 2:].eq(float("-inf")).all()


def test_appended_items_are_found_and_saved(tmp_path):
    embeddings = saved(tmp_path / "e")
    embeddings.features, embeddings.metadata  # noqa: B018  which are kept, and then out of date
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "e").rglob("*.npy")}
    opened = Embeddings.open(tmp_path / "e")
    for held in (embeddings, opened):
        held.append(unit(12, seed=3))
        assert len(held) == 37
        assert held.search(unit(12, seed=3)[5], 1).indices.tolist() == [[30]]
        assert held.metadata.column("key").to_pylist() == [str(row) for row in range(37)]
    assert len(Embeddings.open(tmp_path / "e")) == 25
    opened.save(tmp_path / "e", part_size=10)
    found = Embeddings.open(tmp_path / "e")
    assert torch.equal(found.features, torch.cat([unit(25), unit(12, seed=3)]))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "parts are written again"
    opened.append(unit(1))
    opened.save(tmp_path / "e")
    assert len(Embeddings.open(tmp_path / "e")) == 38


def test_an_append_that_was_killed_has_not_happened(tmp_path):
    saved(tmp_path / "e")
    program = f"""
import os, signal, sys
from clipfast import Embeddings
from clipfast.search import embeddings, layout
from tests.search.test_embeddings import unit
held = Embeddings.open({str(tmp_path / "e")!r})
held.append(unit(12, seed=3))
embeddings.write_about = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
held.save({str(tmp_path / "e")!r}, part_size=10)
"""
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.getcwd()}, check=False)
    assert run.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "e/metadata").iterdir())) == 5
    held = Embeddings.open(tmp_path / "e")
    assert len(held) == 25
    held.append(unit(3, seed=4))
    held.save(tmp_path / "e")
    assert torch.equal(Embeddings.open(tmp_path / "e").features, torch.cat([unit(25), unit(3, seed=4)]))


def test_columns_that_differ_between_parts():
    embeddings = Embeddings(unit(1), {"score": [1], "note": [None], "tag": [1]})
    embeddings.append(unit(1), {"score": [0.5], "note": ["x"], "tag": ["b"], "new": [2]})
    table = embeddings.metadata.to_pydict()
    assert table["note"] == [None, "x"]
    assert table["tag"] == ["1", "b"]
    assert table["new"] == [None, 2]


def damaged(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "img_emb/img_emb_0001.npy").unlink(), "lacks 1 of its 3 parts, the first of them number 1"),
        (lambda e: (e / "metadata/metadata_0002.parquet").unlink(), "lacks 1 of its 3 parts"),
        (lambda e: shutil.rmtree(e / "metadata"), "lacks 3 of its 3 parts"),
        (lambda e: os.truncate(e / "img_emb/img_emb_0001.npy", 200), "cannot be read as features"),
        (lambda e: os.truncate(e / "img_emb/img_emb_0001.npy", 3), "cannot be read as features"),
        (lambda e: damaged(e / "img_emb/img_emb_0001.npy", b")", b"("), "cannot be read as features"),
        (lambda e: os.truncate(e / "metadata/metadata_0001.parquet", 50), "cannot be read as metadata"),
        (lambda e: np.save(e / "img_emb/img_emb_0001.npy", np.zeros((9, 16), np.float32)), "has 9 rows, and .* has 10"),
        (lambda e: np.save(e / "img_emb/img_emb_0001.npy", np.zeros((10, 8), np.float32)), "do not belong together"),
        (lambda e: np.save(e / "img_emb/img_emb_0001.npy", np.zeros((10, 16), np.int64)), "torch.int64; features are"),
        (lambda e: np.save(e / "img_emb/img_emb_0001.npy", np.array([{}]), allow_pickle=True), "cannot be read as"),
        (lambda e: (e / "about.json").write_text("{"), "about.json cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    saved(tmp_path / "e")
    damage(tmp_path / "e")
    with pytest.raises(ValueError, match=message):
        Embeddings.open(tmp_path / "e")


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "e").mkdir()
    (tmp_path / "e/mine").write_text("mine")
    with pytest.raises(ValueError, match="holds no embeddings"):
        Embeddings.open(tmp_path / "e")
    with pytest.raises(FileExistsError):
        Embeddings(unit(2)).save(tmp_path / "e")
    assert [path.name for path in tmp_path.rglob("*")] == ["e", "mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "need features"),
        ({"features": unit(2)[0]}, r"must be \[N, D\]"),
        ({"features": unit(2).double()}, "torch.float64"),
        ({"features": unit(2), "text_features": unit(3)}, "one row of each"),
        ({"features": unit(2), "metadata": {"key": ["a"]}}, "one row of each"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(**arguments)


def test_wrong_appends_and_searches_change_nothing():
    embeddings = Embeddings(unit(4), COLUMNS)
    for wrong in (unit(2, 8), unit(2).half(), None):
        with pytest.raises(ValueError, match="features"):
            embeddings.append(wrong, text_features=None if wrong is not None else unit(2))
    assert len(embeddings) == 4
    for arguments, message in [
        ({"k": 0}, "k must be"),
        ({"kind": "sound"}, "kind must be"),
        ({"kind": "text"}, "no text features"),
        ({"where": [True]}, "4 bools"),
        ({"where": torch.ones(4)}, "4 bools"),
        ({"where": "size > 3"}, "no column 'size'; there are: image_path, caption, width"),
    ]:
        with pytest.raises(ValueError, match=message):
            embeddings.search(unit(1), **arguments)
    with pytest.raises(ValueError, match="same width"):
        embeddings.search(unit(1, 8))
