"""``clipfast app``: a page on this machine that searches an embedded folder, classifies, and shows heat maps."""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Count
from .search_arguments import add_encoder_arguments, add_folder_argument, encoder_of

if TYPE_CHECKING:  # these modules load PyTorch, which --help must not do, so they are imported for annotations only
    from ..search.app import Desk, Pictures

PORT = 7860  # the default port of the page, the same as Gradio's


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast app``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "app",
        description="Serve a page to this machine alone that searches an embedded folder by words, a dropped picture "
        "or both, with filters on the metadata, classifies a dropped picture with labels of one's own, and draws heat "
        "maps of it for texts. Nothing is sent to anybody. Ctrl-C ends it. It needs Gradio: "
        "pip install 'clipfast[app]'.",
        epilog="Example: clipfast app embedded/photos",
    )
    add = parser.add_argument
    add_folder_argument(parser)
    add_encoder_arguments(parser)
    pictures = "folders whose pictures may be shown (default: the source that was embedded)"
    add("--pictures", type=Path, nargs="+", metavar="FOLDER", help=pictures)
    add("--port", type=Count(1, 65535), default=PORT, help=f"port to listen on (default: {PORT})")
    add("--no-browser", action="store_true", help="do not open the page in a browser")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast app``: serve the page until Ctrl-C, and return the exit code."""
    import importlib.util

    from ..search.app_server import check_port, serving, wait

    check_port(args.port)
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("clipfast app needs Gradio: pip install 'clipfast[app]'")
    desk = desk_of(args)
    count = f"{len(desk.embeddings):,} items"
    title = f"<h1>{html.escape(str(args.folder))}</h1><p class='quiet'>{count}, by {html.escape(desk.encoder.name)}</p>"
    with serving(desk, title, args.port, browser=not args.no_browser) as address:
        wait(f"{address} searches {count} of {args.folder}; Ctrl-C ends it")
    return 0


def desk_of(args: argparse.Namespace) -> Desk:
    """Load the embeddings and the model that the arguments of ``clipfast app`` name, for its page.

    Raises:
        ValueError: the folder, the model or a folder of pictures cannot be used.
    """
    from ..search.app import Desk, Pictures
    from ..search.embeddings import Embeddings

    missing = [str(folder) for folder in args.pictures or () if not folder.is_dir()]
    if missing:
        raise ValueError(f"--pictures {missing[0]} is not a folder")
    embeddings = Embeddings.open(args.folder)
    pictures = Pictures(args.pictures) if args.pictures else _pictures(embeddings.about)
    encoder = encoder_of(args, embeddings)
    return Desk(embeddings.to(encoder.device), encoder, pictures)


def _pictures(about: Mapping[str, Any]) -> Pictures:
    """Open the source of the embeddings, whose pictures ``clipfast app`` shows.

    If it cannot be opened, print the reason; the app then shows no pictures.
    """
    from ..search.app import Pictures

    try:
        return Pictures.of(about)
    except (ValueError, OSError) as error:
        print(f"clipfast app: pictures are not shown: {error}; --pictures names their folder", file=sys.stderr)
        return Pictures()
