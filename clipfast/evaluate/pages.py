"""The HTML pages of ``clipfast eval ... --html``: for each task a table of its results, and images of its data."""

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

EXAMPLES = 6  # the zero-shot page shows at most this many images of each of the worst classes
BELOW = 4  # on the overlap page, one in this many pairs is below the threshold
MOST_GROUPS = 12  # the compositional page shows pictures of the largest groups of cases, at most this many
INTERVALS = "95% intervals in brackets."

# JavaScript of the suite's page: a click on the header of a column sorts the table by it, and a second click reverses
# the order. Cells with numbers are sorted by value.
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
    """Return thumbnails of the images whose features are at ``places`` in ``found``; the images are read again."""
    by_number = {found.numbers[place]: place for place in places}
    return {by_number[item.number]: thumbnail(item.image) for item in images.only(sorted(by_number))}


def zeroshot_page(
    results: dict[str, Any], rows: Sequence[Sequence[str]], images: LabelledSet, found: LabelledFeatures,
    classified: Classified,
) -> str:  # fmt: skip
    """Return the HTML of zero-shot results with images of the worst classes, the least similar to their class first.

    Args:
        results: the results of ``clipfast eval zeroshot``.
        rows: the rows of its table.
        images: the set.
        found: the features and labels of its images.
        classified: the predictions for its images.
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
    """Return the HTML of overlap results with pairs of test and training images, the most similar pairs first.

    Args:
        results: the results of ``clipfast eval overlap``.
        test, train: each set with its features.
        pairs: the pairs of test and training images.
        most: the number of pairs to show: near duplicates at equal distances in rank, and the first pairs below the
            threshold.
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
    """Return at most ``most`` elements, evenly spaced from the first to the last, as examples on a page of results."""
    count = min(most, len(places))
    return [places[round(number * (len(places) - 1) / max(1, count - 1))] for number in range(count)]


def compositional_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of compositional results: a head, a row for each group, and a row for all cases."""
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
    """Return in words whether the interval of an accuracy lies above chance, below it, or includes it."""
    (low, high), chance = found["intervals"]["acc"], found["chance"]["acc"]
    if low > chance:
        return "above chance"
    return "below chance" if high < chance else "could be chance"


def compositional_page(results: dict[str, Any], images: LabelledSet, judged: Sequence[Judged], examples: int) -> str:
    """Return the HTML of compositional results with images of some cases and the scores of their captions.

    Args:
        results: the results of ``clipfast eval compositional``.
        images: the set.
        judged: the cases with their scores.
        examples: the number of cases to show for each group.
    """
    about = (
        f"{results['cases']:,} cases. {INTERVALS} Chance is the share that scores at random would have; a tie counts "
        "as wrong. The caption with a ✓ is the right one for a picture, and the model prefers the one with an arrow; "
        "the numbers are cosine similarities."
    )
    title = f"Compositional: {results['model']} on {results['data']}"
    parts = [section(title, about, level=1), table(compositional_rows(results))]
    # A benchmark may divide its cases into groups by several keys. The page has a section for each group of the first
    # key, or a single section for all cases if there is no key.
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
    """Choose compositional cases to show on a page, half of them right and half wrong if there are enough of both.

    The right cases and the wrong cases each begin with the largest margin between the right caption and the best wrong
    one, and end with the smallest.
    """
    right, wrong = ([one for one in members if one.verdicts["acc"] == is_right] for is_right in (True, False))
    of_wrong = min(len(wrong), max(examples // 2, examples - len(right)))
    found = []
    for some, count in ((right, examples - of_wrong), (wrong, of_wrong)):
        order = sorted(some, key=lambda one: -abs(one.lead))
        found += [order[place] for place in _spread(range(len(order)), count)]
    return found


def _case(one: Judged, pictures: dict[int, str]) -> list[str]:
    """Return the HTML of each image of a compositional case with its captions; an arrow marks the highest score."""
    shown = []
    for own, (image, scores) in enumerate(zip(one.case.images, one.scores, strict=True)):
        lines = []
        for place, (text, score) in enumerate(zip(one.case.captions, scores, strict=True)):
            mark = " ←" if score == max(scores) else ""
            lines.append(f"{'✓' if place == own else '✗'} {' '.join(text.split())} {score:.3f}{mark}")
        shown.append(figure(pictures[image], "\n".join(lines), "right" if one.verdicts["acc"] else "wrong"))
    return shown


def suite_page(results: dict[str, Any], chief: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return the HTML of the results of a suite: every metric of every set and model.

    Args:
        results: the results of ``clipfast eval suite``.
        chief: the rows of its table of main metrics, which the picture shows.
        rows: the rows of all metrics.
    """
    names = [label(model["model"], model["pretrained"]) for model in results["models"]]
    about = f"Split {results['split']}. {INTERVALS} A click on the head of a column sorts by it."
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
    """Return the cells of a row of metrics in the table of the suite's page, with values to sort by."""
    values: list[Cell] = []
    for value in row["values"]:
        is_there = value is not None and value[0] is not None
        values.append((percent(*value), value[0]) if is_there else ("-", -1.0))
    return [row["set"], row["task"], (f"{row['images']:,}", row["images"]), row["metric"], *values]
