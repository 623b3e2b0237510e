"""The pages of ``--html``, for each task: its figures, and images of its data."""

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any

from ..io.page import Cell, figure, section, table, thumbnail
from .classification import Classified
from .compositional_scores import MEAN, Judged
from .features import LabelledFeatures
from .intervals import percent
from .labelled import LabelledSet
from .overlap_pairs import LEVEL, Pairs
from .suite import label

EXAMPLES = 6  # images that are shown of a class
BELOW = 4  # of so many pairs one lies below the threshold
MOST_GROUPS = 12  # that have pictures: those with the most cases
INTERVALS = "95% intervals in brackets."

# Sorts a table by the column whose head is pressed, numbers by value; pressed again, the other way round.
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const key = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const compare = (x, y) => isNaN(x - y) ? x.localeCompare(y) : x - y;
  const up = head.ariaSort === "descending" || head.ariaSort === null ? 1 : -1;
  head.ariaSort = up === 1 ? "ascending" : "descending";
  body.append(...[...body.rows].sort((a, b) => up * compare(key(a), key(b))));
};
"""


def thumbnails(images: LabelledSet, found: LabelledFeatures, places: Iterable[int]) -> dict[int, str]:
    """Return small images by their places among the features; they are read from the set again."""
    by_number = {found.numbers[place]: place for place in places}
    return {by_number[item.number]: thumbnail(item.image) for item in images.only(sorted(by_number))}


def zeroshot_page(
    results: dict[str, Any], rows: Sequence[Sequence[str]], images: LabelledSet, found: LabelledFeatures,
    classified: Classified,
) -> str:  # fmt: skip
    """Return the body of a page with the figures, and images of the worst classes: those that fit least come first.

    Args:
        results: of ``clipfast eval zeroshot``.
        rows: its table.
        images: the set.
        found: the labels of its images.
        classified: their classes.
    """
    members: dict[str, list[int]] = {}
    for place, name in enumerate(found.labels):
        members.setdefault(name, []).append(place)
    worst = results["worst_classes"]
    shown = {
        row["class"]: sorted(members[row["class"]], key=classified.ahead.__getitem__, reverse=True)[:EXAMPLES]
        + [members[name][0] for name in row["taken_for"] if name in members]
        for row in worst
    }
    pictures = thumbnails(images, found, {place for places in shown.values() for place in places})
    title = f"Zero-shot classification: {results['model']} on {results['data']}"
    about = f"{results['images']:,} images, {results['classes']:,} classes. {INTERVALS}"
    parts = [section(title, about, level=1), table(rows)]
    for row in worst:
        figures = []
        for place in shown[row["class"]]:
            taken = classified.classnames[int(classified.best[place, 0])]
            caption, kind = ("right", "right") if taken == row["class"] else (f"taken for {taken}", "wrong")
            if found.labels[place] != row["class"]:
                caption, kind = f"an image of {found.labels[place]}", "other"
            figures.append(figure(pictures[place], caption, kind))
        words = f"Images: {row['images']:,}; right: {row['recall']:.1%}; mean place: {row['mean_place']:.1f}."
        parts.append(section(row["class"], words, figures))
    return "\n".join(parts)


def overlap_page(
    results: dict[str, Any], test: tuple[LabelledSet, LabelledFeatures], train: tuple[LabelledSet, LabelledFeatures],
    pairs: Pairs, most: int,
) -> str:  # fmt: skip
    """Return the body of a page with pairs of pictures, the most similar first.

    Args:
        results: of ``clipfast eval overlap``.
        test, train: the sets with what is known of their images.
        pairs: the pairs of these images.
        most: how many pairs to show: some of the near duplicates at equal distances, and the next ones below them.
    """
    order = pairs.similarity.argsort(descending=True, stable=True).tolist()
    count, threshold = results["images"]["overlap"], f"{results['threshold']:g}"
    below = order[count : count + max(1, most // BELOW)]
    above = _spread(order[:count], most - len(below))
    tests = thumbnails(*test, {*above, *below})
    trains = thumbnails(*train, {int(pairs.places[place]) for place in (*above, *below)})
    shares = {name: percent(results["metrics"][name], interval) for name, interval in results["intervals"].items()}
    about = (
        f"Zero-shot accuracy: all {shares['acc1']}, overlap {shares['acc1_overlap']}, clean {shares['acc1_clean']}; "
    )
    title = f"Overlap: {results['data']} (left) and {results['train_data']} (right)"
    parts = [section(title, f"{about}{INTERVALS} Those of overlap are {LEVEL:.1%} intervals.", level=1)]
    for heading, chosen, total in (
        (f"Near duplicates: {threshold} or more", above, count),
        (f"Just below {threshold}", below, len(order) - count),
    ):
        shown = []
        for place in chosen:
            other = int(pairs.places[place])
            closeness = "equal pixels" if pairs.same[place] else f"{pairs.similarity[place]:.3f}"
            left = figure(tests[place], f"{closeness}: {test[1].labels[place]}", "other")
            right = figure(trains[other], train[1].captions[other][0], "other")
            shown.append(f'<div class="pair">{left}{right}</div>')
        if shown:
            parts.append(section(heading, f"{len(chosen):,} of {total:,} pairs", shown))
    return "\n".join(parts)


def _spread(places: Sequence[int], most: int) -> list[int]:
    """Return at most so many of some places, at equal distances, with the first and the last."""
    count = min(most, len(places))
    return [places[round(number * (len(places) - 1) / max(1, count - 1))] for number in range(count)]


def compositional_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return a table of the figures of each group and of all cases, each beside chance; the first row is its head."""
    names = [name for name in results["metrics"] if name != MEAN]
    rows = [["group", "cases", *(word for name in names for word in (name, "chance")), ""]]
    groups = {f"{division}: {name}": x for division, some in results["groups"].items() for name, x in some.items()}
    for title, found in {**groups, "all": results}.items():
        row = [title, f"{found['cases']:,}"]
        for name in names:
            row += [percent(found["metrics"][name], found["intervals"][name]), f"{found['chance'][name]:.1%}"]
        rows.append([*row, _against_chance(found)])
    return rows


def _against_chance(found: dict[str, Any]) -> str:
    """Return in words on which side of chance the interval of the accuracy lies."""
    (low, high), chance = found["intervals"]["acc"], found["chance"]["acc"]
    if low > chance:
        return "above chance"
    return "below chance" if high < chance else "could be chance"


def compositional_page(results: dict[str, Any], images: LabelledSet, judged: Sequence[Judged], examples: int) -> str:
    """Return the body of a page with the figures, and images of cases with the scores of their captions.

    Args:
        results: of ``clipfast eval compositional``.
        images: the set.
        judged: the cases with their scores.
        examples: how many cases of each group to show.
    """
    about = (
        f"{results['cases']:,} cases. {INTERVALS} Chance is the share that scores at random would have; a tie counts "
        "as wrong. The caption with a ✓ is the right one for a picture, and the model prefers the one with an arrow; "
        "the numbers are cosine similarities."
    )
    title = f"Compositional: {results['model']} on {results['data']}"
    parts = [section(title, about, level=1), table(compositional_rows(results))]
    # the first division of which there are groups of cases; without one, all cases are one group
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
        share = percent(found["metrics"]["acc"], found["intervals"]["acc"])
        chance = f"chance is {found['chance']['acc']:.1%}: {_against_chance(found)}"
        figures = [text for one in some for text in _case(one, pictures)]
        heading = f"{division}: {name}" if division else name
        parts.append(section(heading, f"{share} of {found['cases']:,} right; {chance}", figures))
    return "\n".join(parts)


def chosen(members: Sequence[Judged], examples: int) -> list[Judged]:
    """Return cases to show: right and wrong ones, half of each where there are as many.

    The first is the one about which the model is most sure, right or wrong, and the last the one that it all but ties.
    """
    right, wrong = ([one for one in members if one.verdicts["acc"] == is_right] for is_right in (True, False))
    of_wrong = min(len(wrong), max(examples // 2, examples - len(right)))
    found = []
    for some, count in ((right, examples - of_wrong), (wrong, of_wrong)):
        order = sorted(some, key=lambda one: -abs(one.lead))
        found += [order[place] for place in _spread(range(len(order)), count)]
    return found


def _case(one: Judged, pictures: dict[int, str]) -> list[str]:
    """Return the images of a case, each with its captions; an arrow marks the one with the highest score."""
    shown = []
    for own, (image, scores) in enumerate(zip(one.case.images, one.scores, strict=True)):
        lines = []
        for place, (text, score) in enumerate(zip(one.case.captions, scores, strict=True)):
            mark = " ←" if score == max(scores) else ""
            lines.append(f"{'✓' if place == own else '✗'} {' '.join(text.split())} {score:.3f}{mark}")
        shown.append(figure(pictures[image], "\n".join(lines), "right" if one.verdicts["acc"] else "wrong"))
    return shown


def suite_page(results: dict[str, Any], chief: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return the body of a page with every figure of every set by every model.

    Args:
        results: of ``clipfast eval suite``.
        chief: the rows of its table, which are drawn.
        rows: those of all figures.
    """
    names = [label(model["model"], model["pretrained"]) for model in results["models"]]
    about = f"Split {results['split']}. {INTERVALS} A head sorts its column."
    parts = [section(f"{', '.join(names)} on {results['root']}", about, level=1)]
    parts += [section(f"Left out: {problem['name']}", problem["reason"]) for problem in results["problems"]]
    means = [
        ["", mean["task"], f"mean of {mean['sets']}", mean["metric"], *(f"{value:.1%}" for value in mean["values"])]
        for mean in results["means"]
    ]
    parts.append(table(map(_cells, rows), ["set", "task", "images", "metric", *names], means))
    if chief:
        from .plots import suite_figure

        stream = io.BytesIO()
        suite_figure(results, chief).savefig(stream, format="svg")
        address = f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"
        parts.append(f'<img class="picture" src="{address}" alt="the chief figures of each set with their intervals">')
    if results["missing"]:
        parts.append(section(f"{len(results['missing'])} sets are not there", ", ".join(results["missing"])))
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> list[Cell]:
    values: list[Cell] = []
    for value in row["values"]:
        is_there = value is not None and value[0] is not None
        values.append((percent(*value), value[0]) if is_there else ("-", -1.0))
    return [row["set"], row["task"], (f"{row['images']:,}", row["images"]), row["metric"], *values]
