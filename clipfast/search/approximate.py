"""Approximate search of embeddings by a faiss index, which is kept in the user's cache with its measured recall."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.index import cache_folder
from ..data.staging import file_name
from ..io.files import replace_file, replace_text
from .embeddings import Found
from .layout import ABOUT, IMAGES, SUFFIXES, TEXTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .embeddings import Embeddings

FOLDER = "faiss"
RECALL = 0.95  # a search visits as many inverted lists (nprobe) as this recall on the sample queries needs
SAMPLE, SAMPLE_K = 200, 10  # the number of sample queries by which recall is measured, and the k of its recall@k
PER_LIST = 39  # faiss wants at least this many training vectors for each list
WHOLE = 5_000_000  # an index of at least this many items stores features in 8 bits, a smaller one in float32


def search(
    embeddings: Embeddings, folder: Path, query: Tensor, k: int, mask: NDArray[np.bool_] | None, kind: str
) -> tuple[Found, dict[str, Any]]:
    """Search embeddings by an approximate index, which is built first if it is missing or the embeddings have changed.

    Args:
        embeddings: the embeddings in the folder.
        folder: the folder of the embeddings.
        query: the features of the queries [Q, D] on the CPU.
        k: the number of items to find for each query.
        mask: a bool for each item; items with False are not found.
        kind: "image" or "text".

    Returns:
        The found items, and the description of the index, with its ``recall`` against exact search.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError("--index faiss needs faiss: pip install 'clipfast[search]'") from error
    index, about = _index(embeddings, folder, kind)
    selector = {} if mask is None else {"sel": faiss.IDSelectorBatch(np.flatnonzero(mask))}
    options = faiss.SearchParametersIVF(nprobe=about["probes"], **selector)
    scores, places = index.search(np.ascontiguousarray(query.float().numpy()), k, params=options)
    scores = np.where(places < 0, -np.inf, scores)
    return Found(torch.from_numpy(scores), torch.from_numpy(places)), about


def _index(embeddings: Embeddings, folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """Return the faiss index of embeddings and its description: cached, or built if the embeddings have changed."""
    import faiss

    # The index is stored in the user's cache and not beside the embeddings: faiss reads index files without checks, and
    # a folder of embeddings may come from somebody else.
    home = cache_folder() / FOLDER / file_name(str(folder.resolve()))
    path, note = home / f"{kind}.index", home / f"{kind}.json"
    stamp = _stamp(folder, kind)
    if path.is_file() and note.is_file():
        about: dict[str, Any] = json.loads(note.read_text("utf-8"))
        if about.get("stamp") == stamp:
            return faiss.read_index(str(path)), about
    # The description is written last, and removed before the index is replaced. Therefore an index with a description
    # is complete.
    note.unlink(missing_ok=True)
    features = embeddings.of_kind(kind)
    if features is None:
        raise ValueError(f"{folder} has no {kind} features to index")
    others = embeddings.of_kind("text" if kind == "image" else "image")
    # Recall is measured with features of the other kind as queries, since texts search pictures. If there are none, the
    # items themselves are the queries.
    index, about = make_index(features, sample(features if others is None else others))
    about |= {"stamp": stamp, "folder": str(folder.resolve())}
    _drop_left(home.parent)
    home.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: faiss.write_index(index, str(temporary)), features.nbytes)
    replace_text(note, json.dumps(about, indent=2) + "\n")
    return index, about


def _drop_left(homes: Path) -> None:
    """Remove faiss indexes from the cache whose folders of embeddings no longer exist."""
    for note in homes.glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError):  # another process may remove or write the file at the same time
            folder = json.loads(note.read_text("utf-8")).get("folder")
            if folder is None or not Path(folder).exists():
                shutil.rmtree(note.parent)


def _stamp(folder: Path, kind: str) -> str:
    """Return a hash of the embedding files' names, sizes and times; a cached index with another hash is out of date."""
    part = IMAGES if kind == "image" else TEXTS
    paths = [folder / ABOUT, *sorted((folder / part).glob(f"{part}_*{SUFFIXES[part]}"))]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def sample(features: Tensor) -> Tensor:
    """Draw at most SAMPLE features [N, D] at random as float32 queries that measure the recall of a faiss index."""
    places = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return features[places].float()


def make_index(features: Tensor, queries: Tensor) -> tuple[Any, dict[str, Any]]:
    """Build a faiss index, which searches as many of its lists as it needs for a recall of 95% on some queries.

    The index has about 4 sqrt(N) inverted lists. Features are stored in float32, or from five million items on in 8
    bits.

    Args:
        features: the features of the items [N, D].
        queries: the features of the queries [Q, D], float32.

    Returns:
        The index and its description.
    """
    import faiss

    from ..kernels import top_k

    count, width = features.shape
    lists = max(1, min(int(4 * math.sqrt(count)), count // PER_LIST))
    factory = f"IVF{lists},{'SQ8' if count >= WHOLE else 'Flat'}"
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: 64 * lists].sort().values
    index.train(features[some].float().numpy())
    for block in features.split(65536):
        index.add(np.ascontiguousarray(block.float().numpy()))
    k = min(SAMPLE_K, count)
    exact = top_k(queries.to(features.dtype), features, k)[0].float()
    probes, recall = 0, 0.0
    while probes < lists and recall < RECALL:
        probes = min(max(1, 2 * probes), lists)
        scores, _ = index.search(queries.numpy(), k, params=faiss.SearchParametersIVF(nprobe=probes))
        # An item counts as right if its score is at least that of the k-th item of the exact search. It need not be the
        # same item, since several items may have equal scores.
        recall = float((torch.from_numpy(scores) >= exact[:, -1:] - 1e-3 * exact[:, -1:].abs()).float().mean())
    return index, {
        "factory": factory, "lists": lists, "probes": probes, "recall": recall, "k": k, "sample": len(queries),
        "items": count,
    }  # fmt: skip
