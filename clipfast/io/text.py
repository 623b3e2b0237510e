"""Tables as text: aligned columns for people, or CSV and TSV for programs."""

import csv
import difflib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .files import replace_text

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMULA = re.compile(r"[=+\-@\t\r](?![0-9.]+$)")  # how a spreadsheet formula begins; a number with a sign is no formula


def printable(text: str) -> str:
    """Return text for a terminal: line breaks and other control characters are replaced by escapes."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def align(
    rows: Sequence[Sequence[object]], *, right: Sequence[int] = (), indent: str = "", at_least: Sequence[int] = ()
) -> str:
    """Format rows as a text table with aligned columns, two spaces apart.

    Args:
        rows: rows of cells; every row has as many cells as the first.
        right: indices of the right-aligned columns, such as numbers.
        indent: prefix of every line.
        at_least: minimal widths of the first columns, for tables that are printed in pieces.

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
    """Remove the columns of a text table that are empty below their titles in the first row."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*kept, strict=True)]


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table to a .csv or .tsv file; texts that a spreadsheet would run as formulas get a quote in front.

    Raises:
        DiskFullError: there is no space.
    """
    stream = io.StringIO()
    csv.writer(stream, delimiter=DELIMITERS[path.suffix.lower()], lineterminator="\n").writerows(
        ["'" + cell if isinstance(cell, str) and FORMULA.match(cell) else cell for cell in row] for row in rows
    )
    replace_text(path, stream.getvalue())


def meant(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return " (did you mean ...?)" with up to ``most`` similar known words for an error about the unknown ``word``.

    The text is empty if no known word is similar.
    """
    similar = difflib.get_close_matches(word, known, most)
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""
