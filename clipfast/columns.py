"""Plain-text tables: the one way in which this package lines up columns."""

import itertools
from collections.abc import Sequence


def align(
    rows: Sequence[Sequence[object]], *, right: Sequence[int] = (), indent: str = "", at_least: Sequence[int] = ()
) -> str:
    """Join cells with two spaces between columns that are as wide as their longest cell.

    Args:
        rows: cells by row; every row has as many as the first.
        right: indices of the columns whose cells are pushed to the right, as numbers are.
        indent: stands in front of every line.
        at_least: widths of the first columns, for tables that are printed in pieces.

    Returns:
        One line for each row, without spaces at the ends.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = itertools.zip_longest(zip(*cells, strict=True), at_least[: len(cells[0])], fillvalue=0)
    widths = [max(least, *map(len, column)) for column, least in columns]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
