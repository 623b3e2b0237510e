"""``clipfast heatmap``: show where in a picture texts fit best, as a plot or a page."""

import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import BATCH, DRAWN, PIXELS, Count, add_output
from .eval_arguments import load_encoder
from .search_arguments import add_encoder_arguments, check_pictures

EPILOG = """\
example:
  clipfast heatmap street.jpg "a red car" "a tree" --model hf-hub:ORG/REPO --output heat.png"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast heatmap``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "heatmap",
        description="Show how well each part of a picture fits texts, by the features of the picture's patches.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the picture")
    add("texts", nargs="+", metavar="TEXT", help="what to look for, in the words that the model was trained on")
    add_encoder_arguments(parser, required=True)
    output = "picture to write, in the format that the name ends in, such as .png, .svg or .pdf"
    add_output(parser, "--output", ends=DRAWN, required=True, help=output)
    add_output(parser, "--html", help="also write a page on which each map can be seen larger")
    kinds = "values of the last attention (as MaskCLIP), or the output tokens (default: values)"
    add("--patch-features", "--features", dest="features", default="values", choices=("values", "tokens"), help=kinds)
    scores = "similarity to each text, or its softmax over several texts (default: cosine)"
    add("--scores", default="cosine", choices=("cosine", "softmax"), help=scores)
    size = "resize the shorter side to this; more shows smaller things (default: the model's size)"
    add("--size", type=PIXELS, metavar="PIXELS", help=size)
    stride = "by how much the windows move; less is finer and slower (default: an eighth of the model's size)"
    add("--stride", type=PIXELS, metavar="PIXELS", help=stride)
    margin = "by how much the edge of the picture is continued (default: a quarter of the model's size)"
    add("--margin", type=Count(0, 2**13), metavar="PIXELS", help=margin)
    add("--batch-size", type=BATCH, default=64, help="windows to encode at once (default: 64)")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast heatmap``: write the heat maps, print where each is highest, and return the exit code."""
    from ..distributed.world import ALONE
    from ..io.files import save_figure
    from ..models.images import open_image
    from ..search.heatmap import draw, heat_maps, shares, side_of, to_tensor

    check_pictures([args.image])
    picture = open_image(args.image)
    encoder = load_encoder(args, args.model, args.pretrained, ALONE)
    image = to_tensor(picture, args.size or side_of(encoder.model)).to(encoder.device)
    maps = heat_maps(
        encoder.model, image, encoder.texts(args.texts), features=args.features, stride=args.stride,
        margin=args.margin, batch_size=args.batch_size,
    )  # fmt: skip
    label = "cosine similarity"
    if args.scores == "softmax":
        maps, label = shares(maps, encoder.model.logit_scale.exp().item()), "share of the text"
    figure = draw(picture, maps, args.texts, label)
    save_figure(figure, args.output)
    print(f"wrote {args.output}", file=sys.stderr)
    peaks = [_peak(heat, picture.size) for heat in maps]
    for text, (score, x, y) in zip(args.texts, peaks, strict=True):
        print(f"{text}: {score:.4f} at ({x}, {y})")
    if args.html:
        _write_page(args, picture, maps, peaks, label)
    return 0


def _peak(heat: Any, size: tuple[int, int]) -> tuple[float, int, int]:
    """Return the highest value of a heat map of ``clipfast heatmap``, and its column and row in pixels."""
    y, x = divmod(int(heat.argmax()), heat.shape[1])
    return float(heat.max()), int((x + 0.5) / heat.shape[1] * size[0]), int((y + 0.5) / heat.shape[0] * size[1])


def _write_page(args: argparse.Namespace, picture: Any, maps: Any, peaks: Any, label: str) -> None:
    """Write the HTML page of ``clipfast heatmap`` with the picture and its heat map for each text."""
    from ..search.gallery import Item
    from ..search.heatmap import limits_of, overlay
    from .search_arguments import write_gallery

    items = [Item(picture, args.image.name, path=str(args.image))]
    for text, heat, (score, x, y) in zip(args.texts, maps, peaks, strict=True):
        known = {"highest at": f"({x}, {y})", "lowest": float(heat.min())}
        items.append(Item(overlay(picture, heat, limits_of(maps)), text, score, metadata=known))
    about = (
        f"Where {args.image.name} fits each text by {args.model}: dark is the lowest {label} of all maps, which share "
        "a scale, and bright the highest. Scores: the highest of each map."
    )
    write_gallery(args.html, f"Heat maps of {args.image.name}", items, about, side=512)
