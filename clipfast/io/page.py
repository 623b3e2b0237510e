"""HTML pages with pictures in a single file, which need no network."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .files import replace_text

if TYPE_CHECKING:  # only type hints use Pillow, because pages without pictures must not need it
    from PIL import Image

Cell = str | tuple[str, float]  # the text of a table's cell, or the text and a number to sort by
SIDE = 96  # side of a thumbnail in pixels
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --quiet: #57606a; --back: #fff; --soft: #f6f8fa; --line: #d0d7de;
        --good: #1a7f37; --bad: #cf222e; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --quiet: #9da7b3; --back: #0d1117; --soft: #1c2128; --line: #3d444d;
          --good: #3fb950; --bad: #f85149; --link: #4493f8 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: var(--text);
       background: var(--back); overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin: 1.6rem 0 .2rem }
p { margin: .2rem 0 .5rem; color: var(--quiet) }
table { border-collapse: collapse; display: block; overflow-x: auto; overflow-wrap: normal }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; white-space: nowrap } a { color: var(--link) }
.pair { display: flex; gap: .3rem; margin-right: 1rem }
.row { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0; width: 6.4rem }
figure img { width: 6rem; height: 6rem; object-fit: contain; background: var(--soft); border: 2px solid var(--bad) }
img.picture { width: 100%; height: auto }
th button { font: inherit; color: inherit; font-weight: 600; padding: 0; border: 0; background: none; cursor: pointer }
tfoot td { border-top: 1px solid var(--line); font-weight: 600 }
.right img { border-color: var(--good) } .other img { border: 2px dashed var(--quiet) } figcaption { font-size: .8rem }
"""


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """Return a small JPEG of an image as a data URL for a page.

    Args:
        image: the image, which is scaled down if its longer side has more than ``side`` pixels.
        side: longer side in pixels.
    """
    small = image.convert("RGB")
    small.thumbnail((side, side))
    stream = io.BytesIO()
    # subsampling=0, because the colours of small pictures would blur
    small.save(stream, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def figure(address: str, caption: str, kind: str) -> str:
    """Return the HTML of a page's picture with a caption; ``kind`` is the CSS class of its border, such as "right"."""
    text = "<br>".join(map(html.escape, caption.splitlines()))
    return f'<figure class="{kind}"><img src="{address}" alt=""><figcaption>{text}</figcaption></figure>'


def section(heading: str, words: str, figures: Iterable[str] = (), level: int = 2) -> str:
    """Return the HTML of a section of a page: a heading, a paragraph, and a row of pictures."""
    pictures = "".join(figures)
    row = f'\n<div class="row">{pictures}</div>' if pictures else ""
    return f"<h{level}>{html.escape(heading)}</h{level}>\n<p>{html.escape(words)}</p>{row}"


def table(rows: Iterable[Sequence[Cell]], heads: Sequence[str] = (), last: Iterable[Sequence[Cell]] = ()) -> str:
    """Return the HTML of a table for a page.

    Args:
        rows: rows of cells: texts, or texts with numbers to sort by.
        heads: titles of the columns, as buttons by which a script may sort the rows.
        last: rows that always stay at the end.
    """
    body = _rows(rows)
    if heads:
        head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in heads)
        body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n<tfoot>\n{_rows(last)}\n</tfoot>"
    return f"<table>\n{body}\n</table>"


def _rows(rows: Iterable[Sequence[Cell]]) -> str:
    """Return the HTML of the rows of a page's table."""
    return "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)


def _cell(cell: Cell) -> str:
    """Return the HTML of a cell of a page's table, with its number to sort by."""
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    text, value = cell
    return f'<td data-value="{value}">{html.escape(text)}</td>'


def write_page(path: Path, title: str, body: str, *, script: str = "", style: str = "") -> int:
    """Write an HTML page whose content security policy forbids all loads, and all scripts but one.

    Args:
        path: the file.
        title: title of the window, as text.
        body: HTML of the page's content.
        script: the script of the page.
        style: CSS rules beside those of all pages.

    Returns:
        The size of the file in bytes.

    Raises:
        DiskFullError: there is no space.
    """
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, body = f"{policy}; script-src 'sha256-{digest}'", f"{body}\n<script>{script}</script>"
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{STYLE}{style}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )
    # File names that are not UTF-8 contain lone surrogates, which UTF-8 cannot encode: a "?" takes their place.
    text = text.encode("utf-8", "replace").decode()
    replace_text(path, text)
    return len(text.encode())
