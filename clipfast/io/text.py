"""Tables as text: lined up in columns for people, or with commas or tabs between the cells for programs."""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import replace_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMULA = re.compile(r"[=+\-@\t\r](?![0-9.]+$)")  # what begins one; a number with a sign is none


def printable(text: str) -> str:
    """Return the text with escapes in place of line breaks and whatever else a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
        One line for each row, without spaces at the ends. Control characters are escaped.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    least = [*at_least, *[0] * len(cells[0])]
    widths = [max(width, *map(len, column)) for width, column in zip(least, zip(*cells, strict=True), strict=False)]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return rows without the columns that are empty below their heads, which are the first row."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows of cells to a .csv or .tsv file; a text that a spreadsheet would run as a formula begins with a quote.

    Raises:
        DiskFullError: there is no space.
    """
    stream = io.StringIO()
    csv.writer(stream, delimiter=DELIMITERS[path.suffix.lower()], lineterminator="\n").writerows(
        ["'" + cell if isinstance(cell, str) and FORMULA.match(cell) else cell for cell in row] for row in rows
    )
    replace_text(path, stream.getvalue())


def meant(word: str, known: Iterable[str]) -> str:
    """Return the question whether a known word was meant; "" if none is like it."""
    similar = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {similar[0]}?)" if similar else ""
