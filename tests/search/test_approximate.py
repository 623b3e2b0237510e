"""The approximate index of embeddings: recall, reuse of a saved index, and a new index for changed embeddings."""

import pytest
import torch
import torch.nn.functional as F

from clipfast import Embeddings
from clipfast.search import approximate

faiss = pytest.importorskip("faiss")
pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path):
    """Return a folder of random embeddings, for the approximate index."""
    torch.manual_seed(0)
    Embeddings(F.normalize(torch.randn(900, 16), dim=1)).save(tmp_path / "embedded")
    return tmp_path / "embedded"


def search(folder, query, k, mask=None):
    """Search a folder of embeddings by the approximate index."""
    return approximate.search(Embeddings.open(folder), folder, query, k, mask, "image")


def test_recall_is_that_of_its_answers_and_a_filter_holds(folder):
    features = Embeddings.open(folder).features
    queries = approximate.sample(features)
    found, about = search(folder, queries, 10)
    exact = (queries @ features.T).topk(10).indices
    hits = sum(
        len(set(ours) & set(theirs)) for ours, theirs in zip(found.indices.tolist(), exact.tolist(), strict=True)
    )
    assert about["recall"] == pytest.approx(hits / exact.numel(), abs=2e-3)
    assert about["recall"] >= 0.95
    assert 1 < about["probes"] <= about["lists"] == 23
    found, _ = search(folder, features[:5], 200, torch.arange(900).remainder(7).eq(3).numpy())
    assert set(found.indices.flatten().tolist()) <= {-1, *range(3, 900, 7)}
    assert (found.scores[found.indices < 0] == -torch.inf).all()


def test_made_once_again_after_a_change_and_removed_with_its_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    made, make = [], approximate.make_index
    monkeypatch.setattr(approximate, "make_index", lambda *given: made.append(1) or make(*given))
    query = F.normalize(torch.ones(1, 16), dim=1)
    for _ in range(2):
        search(folder, query, 1)
    assert len(made) == 1
    more = Embeddings.open(folder)
    more.append(query)
    more.save(folder)
    found, about = search(folder, query, 1)
    assert (len(made), found.indices.tolist(), about["items"]) == (2, [[900]], 901)
    folder.rename(tmp_path / "moved")
    search(tmp_path / "moved", query, 1)
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1
