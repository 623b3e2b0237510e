"""The sources of pairs that names stand for."""

from collections.abc import Sequence

from .index import IndexCache
from .samples import is_synthetic
from .shapes import ShapesSource
from .source import MAX_OPEN, Source, open_shards
from .synthetic import SyntheticSource


def open_sources(
    names: Sequence[str],
    workers: int = 0,
    index: IndexCache | None = None,
    max_open: int = MAX_OPEN,
    *,
    whole: bool = False,
) -> list[Source]:
    """Return the sources of pairs: one of all shards, if there are any, and one for each name of synthetic pairs.

    Args:
        names: as :func:`clipfast.data.expand_shards` gives them.
        workers, index, max_open, whole: as :func:`clipfast.data.open_shards` takes them.

    Raises:
        ShardError: a shard is missing, or is not of its format.
    """
    shards = [name for name in names if not is_synthetic(name)]
    opened = [open_shards(shards, workers, index, max_open, whole=whole)] if shards else []
    return [*opened, *(_drawn(name, index) for name in names if is_synthetic(name))]


def _drawn(name: str, index: IndexCache | None) -> Source:
    kind = next(kind for kind in (SyntheticSource, ShapesSource) if name.startswith(kind.prefix))
    return kind.named(name, index)
