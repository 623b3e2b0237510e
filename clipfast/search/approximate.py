"""An approximate index of embeddings by faiss, kept in the user's cache, and how much of the exact answer it finds."""

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
RECALL = 0.95  # for which lists are looked through, on the sample
SAMPLE, SAMPLE_K = 200, 10  # queries by which recall is measured, and how many items each finds
PER_LIST = 39  # items that faiss wants for each list, at least, to train on
WHOLE = 5_000_000  # items from which on vectors are kept in 8 bits


def search(
    embeddings: Embeddings, folder: Path, query: Tensor, k: int, mask: NDArray[np.bool_] | None, kind: str
) -> tuple[Found, dict[str, Any]]:
    """Search the index in a folder, which is made first if there is none, or if the embeddings have changed.

    Args:
        embeddings: of the folder.
        folder: of the embeddings.
        query: features [Q, D] on the CPU.
        k: how many items to find.
        mask: a bool for each item, False for those that are not to be found.
        kind: "image" or "text".

    Returns:
        What was found, and what is known of the index, with its ``recall`` against exact search.

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
    """Return the index with its figures, such as its recall."""
    import faiss

    # In the user's own cache, since faiss trusts an index wholly, and a folder may be anybody's.
    home = cache_folder() / FOLDER / file_name(str(folder.resolve()))
    path, note = home / f"{kind}.index", home / f"{kind}.json"
    stamp = _stamp(folder, kind)
    if path.is_file() and note.is_file():
        about: dict[str, Any] = json.loads(note.read_text("utf-8"))
        if about.get("stamp") == stamp:
            return faiss.read_index(str(path)), about
    note.unlink(missing_ok=True)  # it vouches for the index
    features = embeddings.of_kind(kind)
    if features is None:
        raise ValueError(f"{folder} has no {kind} features to index")
    others = embeddings.of_kind("text" if kind == "image" else "image")
    # queries are texts, by which people search pictures; without texts, they are items
    index, about = make_index(features, sample(features if others is None else others))
    about |= {"stamp": stamp, "folder": str(folder.resolve())}
    _drop_left(home.parent)
    home.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: faiss.write_index(index, str(temporary)), features.nbytes)
    replace_text(note, json.dumps(about, indent=2) + "\n")
    return index, about


def _drop_left(homes: Path) -> None:
    """Remove the indexes of folders that are gone."""
    for note in homes.glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError):  # another process removes or writes it
            folder = json.loads(note.read_text("utf-8")).get("folder")
            if folder is None or not Path(folder).exists():
                shutil.rmtree(note.parent)


def _stamp(folder: Path, kind: str) -> str:
    """Return a text that changes when the features do."""
    part = IMAGES if kind == "image" else TEXTS
    paths = [folder / ABOUT, *sorted((folder / part).glob(f"{part}_*{SUFFIXES[part]}"))]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def sample(features: Tensor) -> Tensor:
    """Return some of the features, to measure recall by."""
    places = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return features[places].float()


def make_index(features: Tensor, queries: Tensor) -> tuple[Any, dict[str, Any]]:
    """Make an index that looks through as many of its lists as it needs for a recall of 95% on some queries.

    There are about 4 sqrt(N) lists. Features are kept as they are, in float32, or in 8 bits from five million on.

    Args:
        features: of the items [N, D].
        queries: features [Q, D], float32.

    Returns:
        The index, and what is known of it.
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
        # an item that is as good as the last of the exact answer is right, whichever of equal ones it is
        recall = float((torch.from_numpy(scores) >= exact[:, -1:] - 1e-3 * exact[:, -1:].abs()).float().mean())
    return index, {
        "factory": factory, "lists": lists, "probes": probes, "recall": recall, "k": k, "sample": len(queries),
        "items": count,
    }  # fmt: skip
