"""The page of ``clipfast eval overlap``: test images beside their most similar training images."""

from __future__ import annotations

import html
from typing import Any

from ...page import figure
from ..features import LabelledFeatures
from ..intervals import percent
from ..labelled import LabelledSet
from ..page import thumbnails
from .overlap_pairs import LEVEL, Pairs

BELOW = 4  # one pair in so many lies below the threshold
Known = tuple[LabelledSet, LabelledFeatures]  # a set, and what is known of its images


def pairs_page(results: dict[str, Any], test: Known, train: Known, pairs: Pairs, most: int) -> str:
    """Return the body of a page with pairs of pictures, the most similar first.

    Args:
        results: of ``clipfast eval overlap``.
        test, train: the sets, from which the images to show are read again.
        pairs: of their images.
        most: how many pairs to show: some of the near duplicates at equal distances, and what is next below them.
    """
    order = pairs.similarity.argsort(descending=True, stable=True).tolist()
    count = results["images"]["overlap"]
    below = order[count : count + max(1, most // BELOW)]
    above = _spread(order[:count], most - len(below))
    tests = thumbnails(*test, {*above, *below})
    trains = thumbnails(*train, {int(pairs.places[place]) for place in (*above, *below)})
    metrics, intervals = results["metrics"], results["intervals"]
    about = (
        f"Zero-shot accuracy: all {percent(metrics['acc1'], intervals['acc1'])}, overlap "
        f"{percent(metrics['acc1_overlap'], intervals['acc1_overlap'])}, clean "
        f"{percent(metrics['acc1_clean'], intervals['acc1_clean'])}; 95% intervals in brackets, "
        f"{LEVEL:.1%} for overlap."
    )
    title = f"Overlap: {results['data']} (left) and {results['train_data']} (right)"
    parts = [f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(about)}</p>"]
    threshold = f"{results['threshold']:g}"
    for heading, chosen, total in (
        (f"Near duplicates: {threshold} or more", above, count),
        (f"Just below {threshold}", below, len(order) - count),
    ):
        if not chosen:
            continue
        shown = []
        for place in chosen:
            other, same = int(pairs.places[place]), bool(pairs.same[place])
            closeness = "equal pixels" if same else f"{pairs.similarity[place]:.3f}"
            captions = (f"{closeness}: {test[1].labels[place]}", train[1].captions[other][0])
            both = (tests[place], captions[0]), (trains[other], captions[1])
            shown.append(f'<div class="pair">{"".join(figure(*one, "other") for one in both)}</div>')
        parts.append(f"<h2>{heading}</h2>\n<p>{len(chosen):,} of {total:,} pairs</p>")
        parts.append(f'<div class="row">{"".join(shown)}</div>')
    return "\n".join(parts)


def _spread(places: list[int], most: int) -> list[int]:
    """Return at most so many of some places, at equal distances, with the first and the last."""
    if len(places) <= most or most < 2:
        return places[:most]
    return [places[round(number * (len(places) - 1) / (most - 1))] for number in range(most)]
