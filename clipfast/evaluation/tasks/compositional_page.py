"""The page of ``clipfast eval compositional``: the figures, and pictures with what a model makes of their captions."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from ...page import table, thumbnail
from ..intervals import percent
from ..labelled import LabelledSet
from .compositional_scores import MEAN, Judged

MOST_GROUPS = 12  # of which there are pictures: those with the most cases


def examples_page(results: dict[str, Any], images: LabelledSet, judged: Sequence[Judged], examples: int) -> str:
    """Return the body of the page.

    Args:
        results: of the task.
        images: the set, from which the images to show are read again.
        judged: the cases with their scores.
        examples: how many cases of each group to show.
    """
    title = f"Compositional: {results['model']} on {results['data']}"
    about = (
        f"{results['cases']:,} cases. 95% intervals in brackets. Chance is the share that scores at random would have; "
        "a tie counts as wrong. Of the captions of a picture, that with a ✓ is right, and the model prefers the one in "
        "bold type; the numbers are cosine similarities."
    )
    parts = [f"<h1>{html.escape(title)}</h1>\n<p>{about}</p>\n{table(rows_of(results))}"]
    # Cases whose groups have names, by the first division; those without divisions are one group.
    division = next((name for name in results["groups"] if any(name in one.case.groups for one in judged)), None)
    members: dict[str, list[Judged]] = {}
    for one in judged:
        members.setdefault(one.case.groups.get(division, "") if division else "all cases", []).append(one)
    largest = sorted(members, key=lambda name: len(members[name]), reverse=True)[:MOST_GROUPS]
    shown = {name: chosen(some, examples) for name, some in members.items() if name in largest}
    places = {image for some in shown.values() for one in some for image in one.case.images}
    pictures = {item.number: thumbnail(item.image) for item in images.only(sorted(places))}
    for name, some in shown.items():
        found = results["groups"][division].get(name, results) if division else results
        heading = f"{division}: {name}" if division else name
        figures = "".join(_figure(one, pictures) for one in some)
        parts.append(f'<h2>{html.escape(heading)}</h2>\n<p>{_verdict(found)}</p>\n<div class="row">{figures}</div>')
    return "\n".join(parts)


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Return a table of the figures of each group and of all cases, each beside chance; the first row is its head."""
    names = [name for name in results["metrics"] if name != MEAN]
    rows = [["group", "cases", *(word for name in names for word in (name, "chance")), ""]]
    groups = {f"{division}: {name}": x for division, some in results["groups"].items() for name, x in some.items()}
    for title, found in {**groups, "all": results}.items():
        figures = (
            word
            for name in names
            for word in (percent(found["metrics"][name], found["intervals"][name]), f"{found['chance'][name]:.1%}")
        )
        rows.append([title, f"{found['cases']:,}", *figures, against_chance(found)])
    return rows


def against_chance(found: dict[str, Any]) -> str:
    """Return in words on which side of chance the interval of the accuracy lies."""
    (low, high), chance = found["intervals"]["acc"], found["chance"]["acc"]
    if low > chance:
        return "above chance"
    return "below chance" if high < chance else "could be chance"


def _verdict(found: dict[str, Any]) -> str:
    share = percent(found["metrics"]["acc"], found["intervals"]["acc"])
    return f"{share} of {found['cases']:,} right; chance is {found['chance']['acc']:.1%}: {against_chance(found)}"


def chosen(members: Sequence[Judged], examples: int) -> list[Judged]:
    """Return cases to show: right and wrong ones, half of each where there are as many, from all over the range.

    The first is that by which the model is most sure, or most wrong, and the last that which it all but ties.
    """
    found = []
    right = [one for one in members if one.verdicts["acc"]]
    wrong = [one for one in members if not one.verdicts["acc"]]
    of_wrong = min(len(wrong), max(examples // 2, examples - len(right)))
    for some, count in ((right, examples - of_wrong), (wrong, of_wrong)):
        order = sorted(some, key=lambda one: -abs(one.lead))
        step = max(len(order) - 1, 0) / max(count - 1, 1)
        found += [order[round(number * step)] for number in range(min(count, len(order)))]
    return found


def _figure(one: Judged, pictures: dict[int, str]) -> str:
    """Return the images of a case, each with its captions; the one with the highest score is marked."""
    kind = "right" if one.verdicts["acc"] else "wrong"
    parts = []
    for own, (image, scores) in enumerate(zip(one.case.images, one.scores, strict=True)):
        lines = []
        for place, (text, score) in enumerate(zip(one.case.captions, scores, strict=True)):
            line = f"{'✓' if place == own else '✗'} {html.escape(text)} {score:.3f}"
            lines.append(f"<b>{line}</b>" if score == max(scores) else line)
        caption = "<br>".join(lines)
        parts.append(
            f'<figure class="{kind}" style="width: 9rem"><img src="{pictures[image]}" alt="">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(parts)
