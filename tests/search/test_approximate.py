"""The approximate index: its recall, its use again, and that it is made anew when the embeddings change."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from clipfast import Embeddings
from clipfast.search import approximate

faiss = pytest.importorskip("faiss")
pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    Embeddings(F.normalize(torch.randn(900, 16), dim=1)).save(tmp_path / "embedded")
    return tmp_path / "embedded"


def test_recall_is_that_of_its_answers(folder):
    embeddings = Embeddings.open(folder)
    queries = approximate.sample(embeddings.features)
    found, about = approximate.search(embeddings, folder, queries, 10, None, "image")
    exact = embeddings.search(queries, 10).indices
    hits = sum(
        len(set(ours) & set(theirs)) for ours, theirs in zip(found.indices.tolist(), exact.tolist(), strict=True)
    )
    assert about["recall"] == pytest.approx(hits / exact.numel(), abs=2e-3)
    assert about["recall"] >= 0.95
    assert 1 < about["probes"] <= about["lists"] == 23


def test_a_filter(folder):
    embeddings = Embeddings.open(folder)
    mask = torch.arange(900).remainder(7).eq(3).numpy()
    found, _ = approximate.search(embeddings, folder, embeddings.features[:5], 200, mask, "image")
    assert set(found.indices.flatten().tolist()) <= {-1, *range(3, 900, 7)}
    assert (found.scores[found.indices < 0] == -torch.inf).all()


def test_made_once_and_again_after_a_change(folder, monkeypatch):
    made = []
    make = approximate.make_index
    monkeypatch.setattr(approximate, "make_index", lambda *given: made.append(1) or make(*given))
    query = F.normalize(torch.ones(1, 16), dim=1)
    for _ in range(2):
        found, _ = approximate.search(Embeddings.open(folder), folder, query, 1, None, "image")
    assert len(made) == 1
    more = Embeddings.open(folder)
    more.append(query)
    more.save(folder)
    found, about = approximate.search(Embeddings.open(folder), folder, query, 1, None, "image")
    assert (len(made), found.indices.tolist(), about["items"]) == (2, [[900]], 901)


def test_the_index_of_a_folder_that_is_gone_is_removed(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    query = F.normalize(torch.ones(1, 16), dim=1)
    indexes = []
    for name in "abc":
        Embeddings.open(folder).save(tmp_path / name)
        approximate.search(Embeddings.open(tmp_path / name), tmp_path / name, query, 1, None, "image")
        indexes.append(len(list((tmp_path / "cache").rglob("*.index"))))
        if name == "b":
            shutil.rmtree(tmp_path / "a")
    assert indexes == [1, 2, 2]
