"""``clipfast classify``: which of some labels fits each picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .eval_arguments import add_templates_argument, read_classnames, read_templates, write_results
from .search_arguments import add_encoder_arguments, add_result_arguments, check_pictures

SHOWN = 5  # the table and the page show this many labels for each picture, the most probable ones


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast classify``. Files and names are checked when the command runs."""
    parser = commands.add_parser(
        "classify",
        description="Compute the probability of each label for each picture: softmax over the labels, or for a SigLIP "
        "model, which judges each label by itself, the sigmoid.",
        epilog="Example: clipfast classify photo.jpg --labels cat dog 'a red flower' --model ViT-B-32 "
        "--pretrained openai --table",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="pictures")
    add("--labels", nargs="+", metavar="LABEL", help="the labels")
    names = "labels in a text file, one a line, or 'imagenet', in place of --labels"
    add("--classnames", metavar="FILE", help=names)
    add_templates_argument(parser)
    add_encoder_arguments(parser, required=True)
    add_result_arguments(parser, "the pictures and their labels")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast classify``: classify, show the probabilities, and return the exit code."""
    labels, templates = _labels(args), read_templates(args.templates)
    check_pictures(args.images)
    from ..distributed.world import ALONE
    from ..search.gallery import Item
    from ..search.similar import probabilities
    from .eval_arguments import load_encoder
    from .search import image_features
    from .search_arguments import write_gallery

    encoder = load_encoder(args, args.model, args.pretrained, ALONE)
    if len(labels) == 1 and encoder.model.logit_bias is None:
        raise ValueError(f"the only label is {labels[0]!r}, whose softmax is 1: give several, with spaces between them")
    found = probabilities(encoder, image_features(encoder, args.images), encoder.classifier(labels, templates))
    pictures = []
    for path, row in zip(args.images, found.tolist(), strict=True):
        order = sorted(range(len(labels)), key=lambda place: -row[place])
        pictures.append({"image": str(path), "probabilities": {labels[place]: row[place] for place in order}})
    results = {
        "model": args.model, "pretrained": args.pretrained or "", "templates": args.templates,
        "probabilities": "softmax" if encoder.model.logit_bias is None else "sigmoid", "pictures": pictures,
    }  # fmt: skip
    if args.html:
        items = (_item(Item, one) for one in pictures)
        about = f"The label that fits best, and its probability, by {args.model}. Labels: {', '.join(labels)}"
        write_gallery(args.html, "Classified pictures", items, about[:500])
    write_results(args, results, _table, shown=args.html)
    return 0


def _labels(args: argparse.Namespace) -> list[str]:
    """Return the class labels from the arguments of ``clipfast classify``.

    Raises:
        ValueError: there are no labels, a label occurs twice, or labels are given in two ways.
    """
    if (args.labels is None) == (args.classnames is None):
        raise ValueError("give either --labels or --classnames")
    labels = list(args.labels or read_classnames(args.classnames) or ())
    twice = [label for label in labels if labels.count(label) > 1]
    if twice and args.labels:
        raise ValueError(f"--labels names {twice[0]!r} twice")
    if any(not label.strip() for label in labels):
        raise ValueError("a label is empty")
    return list(dict.fromkeys(labels))


def _item(kind: Any, one: dict[str, Any]) -> Any:
    """Return a picture with its most probable labels as a gallery ``Item`` (``kind``) for the page of ``classify``."""
    label, value = next(iter(one["probabilities"].items()))
    best = {label: round(share, 4) for label, share in list(one["probabilities"].items())[:SHOWN]}
    return kind(Path(one["image"]), label, value, one["image"], metadata=best)


def _table(results: dict[str, Any]) -> str:
    """Return the text table of ``clipfast classify``: the pictures with their labels and probabilities."""
    from ..io.text import align

    rows = [["picture", "label", "probability"]]
    for one in results["pictures"]:
        for place, (label, value) in enumerate(list(one["probabilities"].items())[:SHOWN]):
            rows.append(["" if place else one["image"], label, f"{value:.2%}"])
    return align(rows, right=(2,))
