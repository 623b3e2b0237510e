"""clipfast.Embeddings: a list of features with a table, in memory and in a folder."""

import os
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch

from clipfast import Embeddings
from clipfast.kernels import reference
from clipfast.search import embeddings, layout

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLUMNS = {"caption": ["A cat", "a dog, asleep", None, "two cats"], "width": [640, 32, 256, None]}


@pytest.fixture
def folder(tmp_path):
    """Return the path of the folder to which tests save embeddings."""
    return tmp_path / "e"


def unit(rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draw features of unit length for embeddings."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1).to(dtype)


def saved(path, part_size: int = 10, **options) -> Embeddings:
    """Save 25 embeddings in a folder, and return them."""
    embeddings = Embeddings(**{"features": unit(25), "about": {"model": "tiny"}} | options)
    embeddings.save(path, part_size=part_size)
    return embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_gives_back_what_was_saved_and_plain_readers_read_it(folder, dtype):
    features, texts = unit(25, dtype=dtype), unit(25, seed=1, dtype=dtype)
    table = {"key": [str(row) for row in range(25)], "width": list(range(25))}
    saved(folder, features=features, metadata=table, text_features=texts)
    found = Embeddings.open(folder)
    assert (len(found), found.metadata.to_pydict(), found.about) == (25, table, {"model": "tiny"})
    read = {"img_emb": np.load, "text_emb": np.load, "metadata": parquet.read_table}
    plain = {kind: [load(path) for path in sorted((folder / kind).iterdir())] for kind, load in read.items()}
    assert sorted(path.name for path in (folder / "metadata").iterdir())[2] == "metadata_0002.parquet"
    assert pyarrow.concat_tables(plain["metadata"]).to_pydict() == table
    for kind, expected, opened in (("img_emb", features, found.features), ("text_emb", texts, found.text_features)):
        assert torch.equal(opened, expected)
        assert np.array_equal(np.concatenate(plain[kind]), expected.numpy())
    # The folder loses clipfast's about.json, and its files get clip-retrieval's names for a set of about ten parts.
    (folder / "about.json").unlink()
    for path in folder.rglob("*_000?.*"):
        path.rename(path.with_name(path.name.replace("_000", "_1")))
    again = Embeddings.open(folder)
    again.features[0] = 7  # the change of a feature is in memory only, not in the file
    assert torch.equal(Embeddings.open(folder).features, features)


def test_more_parts_than_four_digits_count_are_in_order(tmp_path):
    names = [layout.part_path(tmp_path, "img_emb", number, 10_001).name for number in (2, 9_999, 10_000)]
    assert names == sorted(names)


def test_search_is_exact_whatever_the_parts(tmp_path):
    items = unit(25)
    items[20] = items[3]  # items 3 and 20 are a tie between two parts
    query = torch.cat([items[3:4], unit(4, seed=2)])
    for part_size, k in ((1, 5), (7, 1), (7, 40), (25, 5)):
        saved(tmp_path / f"{part_size} {k}", part_size, features=items)
        found = Embeddings.open(tmp_path / f"{part_size} {k}").search(query, k)
        scores, indices = reference.top_k(query, items, k)
        torch.testing.assert_close(found.scores, scores)
        assert torch.equal(found.indices, indices)


def test_search_of_one_query_of_texts_and_of_what_may_be_found():
    items, texts = unit(4), unit(4, seed=5)
    embeddings = Embeddings(items, COLUMNS, text_features=texts)
    assert embeddings.search(texts[2], 1, kind="text").indices.tolist() == [[2]]
    assert embeddings.search(items[1].double(), 1).indices.tolist() == [[1]]
    for where in ("width >= 256", torch.tensor([True, False, True, False]), np.array([1, 0, 1, 0], bool)):
        found = embeddings.to("cpu").search(items, 4, where=where)
        assert found.indices.sort(1).values.tolist() == [[-1, -1, 0, 2]] * 4
    assert found.scores[:, 2:].eq(float("-inf")).all()


def test_appended_items_are_found_and_saved(folder):
    first, more = saved(folder), unit(12, seed=3)
    first.features, first.metadata  # noqa: B018  both are cached, so that append must renew them
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}
    opened = Embeddings.open(folder)
    for held in (first, opened):
        held.append(more)
        assert held.search(more[5], 1).indices.tolist() == [[30]]
        assert held.metadata.column("key").to_pylist() == [str(row) for row in range(37)]
        assert torch.equal(held.feature(30), more[5])
    assert len(Embeddings.open(folder)) == 25
    opened.save(folder, part_size=10)
    assert torch.equal(Embeddings.open(folder).features, torch.cat([unit(25), more]))
    assert {file: file.stat().st_mtime_ns for file in before} == before, "parts are written again"


def test_an_append_that_was_killed_has_not_happened(folder):
    saved(folder)
    held = Embeddings.open(folder)
    held.append(unit(12, seed=3))
    killed = patch.object(embeddings, "write_about", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        held.save(folder, part_size=10)
    assert len(list((folder / "metadata").iterdir())) == 5
    held = Embeddings.open(folder)
    assert len(held) == 25
    held.append(unit(3, seed=4))
    held.save(folder)
    assert torch.equal(Embeddings.open(folder).features, torch.cat([unit(25), unit(3, seed=4)]))


def test_columns_that_differ_between_parts():
    embeddings = Embeddings(unit(1), {"score": [1], "note": [None], "tag": [1]})
    embeddings.append(unit(1), {"score": [0.5], "note": ["x"], "tag": ["b"], "new": [2]})
    expected = {"note": [None, "x"], "tag": ["1", "b"], "new": [None, 2]}
    assert embeddings.metadata.select(list(expected)).to_pydict() == expected


def holding(*shape, dtype=np.float32):
    """Return a function that damages embeddings: it replaces a file by zeros of this shape."""
    return lambda path: np.save(path, np.zeros(shape, dtype))


def cut(size):
    """Return a function that damages embeddings: it truncates a file to ``size`` bytes."""
    return lambda path: os.truncate(path, size)


FEATURES, TABLE = "img_emb/img_emb_0001.npy", "metadata/metadata_0001.parquet"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (FEATURES, os.unlink, "lacks 1 of its 3 parts, the first of them number 1"),
        ("metadata", shutil.rmtree, "lacks 3 of its 3 parts"),
        (FEATURES, cut(200), "cannot be read as features"),
        (FEATURES, lambda path: path.write_bytes(path.read_bytes().replace(b")", b"(", 1)), "cannot be read as"),
        (TABLE, cut(50), "cannot be read as metadata"),
        (FEATURES, holding(9, 16), "has 9 rows, and .* has 10"),
        (FEATURES, holding(10, 8), "do not belong together"),
        (FEATURES, holding(10, 16, dtype=np.int64), "torch.int64"),
        (FEATURES, lambda path: np.save(path, np.array([{}]), allow_pickle=True), "cannot be read as"),
        ("about.json", lambda path: path.write_text("{"), "about.json cannot be read"),
        ("about.json", lambda path: path.write_text('{"parts": 1e9}'), "1000000000.0 parts"),
        ("about.json", lambda path: path.write_text(f'{{"parts": {10**30}}}'), "the first of them number 3"),
    ],
)
def test_a_damaged_folder_is_refused(folder, name, damage, message):
    saved(folder)
    damage(folder / name)
    with pytest.raises(ValueError, match=message):
        Embeddings.open(folder)


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds no embeddings"):
        Embeddings.open(tmp_path)
    with pytest.raises(FileExistsError):
        Embeddings(unit(2)).save(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_what_does_not_fit_is_refused_and_changes_nothing():
    embeddings = Embeddings(unit(4), COLUMNS)
    for message, function, arguments in (
        ("need features", Embeddings, {}),
        (r"must be \[N, D\]", Embeddings, {"features": unit(2)[0]}),
        ("torch.float64", Embeddings, {"features": unit(2).double()}),
        ("one row of each", Embeddings, {"features": unit(2), "metadata": {"key": ["a"]}}),
        ("8 wide", embeddings.append, {"features": unit(2, 8)}),
        ("float16", embeddings.append, {"features": unit(2).half()}),
        ("absent", embeddings.append, {"text_features": unit(2)}),
        *((f"no item {number}", embeddings.feature, {"number": number}) for number in (4, True)),
        *(
            (message, embeddings.search, {"query": unit(1)} | given)
            for message, given in (
                ("k must be", {"k": 0}),
                ("kind must be", {"kind": "sound"}),
                ("no text features", {"kind": "text"}),
                ("4 bools", {"where": torch.ones(4)}),
                ("same width", {"query": unit(1, 8)}),
            )
        ),
    ):
        with pytest.raises(ValueError, match=message):
            function(**arguments)
    assert len(embeddings) == 4
