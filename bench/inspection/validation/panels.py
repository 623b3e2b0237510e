"""The bytes that a tiled product reads from device memory.

Each wave of blocks reads once the row panels of A and the column panels of B that it needs, unless they are still in L2
from the waves before. Blocks of a wave move along K together, so that they share what they read.
"""

import collections
from collections.abc import Iterable, Iterator

# Of the 50 MB of L2 some serve other things.
L2_BYTES = 40e6
Wave = list[tuple[int, int]]


def panel_bytes(waves: Iterable[Wave], *, a_panel: float, b_panel: float) -> float:
    """Return the bytes that are read; ``waves`` has the row and column of each tile of each wave."""
    total = 0.0
    held: collections.OrderedDict[tuple[str, int], float] = collections.OrderedDict()
    for tiles in waves:
        panels = {("a", row): a_panel for row, _ in tiles} | {("b", column): b_panel for _, column in tiles}
        total += sum(size for panel, size in panels.items() if panel not in held)
        for panel, size in panels.items():
            held[panel] = size
            held.move_to_end(panel)
        while held and sum(held.values()) > L2_BYTES:
            held.popitem(last=False)
    return total


def row_major(rows: int, columns: int, at_once: int) -> Iterator[Wave]:
    """Yield the waves of a grid in which neighbouring programs differ in the row."""
    yield from _waves([(tile % rows, tile // rows) for tile in range(rows * columns)], at_once)


def grouped(rows: int, columns: int, at_once: int, group: int) -> Iterator[Wave]:
    """Yield the waves of a grid that goes through ``group`` rows at a time, as Triton's tutorial does."""
    tiles = []
    for tile in range(rows * columns):
        first = tile // (group * columns) * group
        size = min(rows - first, group)
        within = tile % (group * columns)
        tiles.append((first + within % size, within // size))
    yield from _waves(tiles, at_once)


def _waves(tiles: Wave, at_once: int) -> Iterator[Wave]:
    for first in range(0, len(tiles), at_once):
        yield tiles[first : first + at_once]
