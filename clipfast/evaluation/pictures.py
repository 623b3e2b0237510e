"""Pictures of a run: its learning curve, and a sheet of images with the captions that it finds most like them."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import save_figure
from .classification import Classified, recalls
from .evaluate import Evaluation
from .intervals import of_share
from .labelled import LabelledImage

RIGHT, WRONG, CHANCE = "#1a7f37", "#57606a", "tab:red"
MOST_GROUPS = 20  # that are drawn, the largest


def learning_curve(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot the training loss, and the accuracy on the validation set if there is one, against the step."""
    losses = [(line["step"], line["loss"]) for line in metrics if "loss" in line]
    evals = [(line["step"], line["eval"]) for line in metrics if "eval" in line]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*losses, strict=True), color="tab:blue") if losses else None
    axis.set(title=title, xlabel="step")
    axis.set_ylabel("training loss (mean since last point)", color="tab:blue")
    axis.set_ylim(bottom=0)
    if evals:
        right = axis.twinx()
        steps = [step for step, _ in evals]
        for key, style in (("top5", "--"), ("top1", "-")):
            values = [100 * result["zero_shot"][key] for _, result in evals]
            label = f"zero-shot {key.replace('top', 'top-')}: {values[-1]:.1f}%"
            right.plot(steps, values, style, marker="o", color="tab:orange", label=label)
        recall = [100 * result["retrieval"]["text_to_image"]["R@1"] for _, result in evals]
        right.plot(steps, recall, ":", marker="s", color="tab:green", label=f"text to image R@1: {recall[-1]:.1f}%")
        draw_chance(right, evals[-1][1]["classes"])
        right.set_ylabel("validation, %", color="tab:orange")
        right.set_ylim(0, 1.1 * max(1.0, *(100 * result["zero_shot"]["top5"] for _, result in evals)))
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path)


def contact_sheet(images: Iterable[LabelledImage], evaluation: Evaluation, path: Path) -> None:
    """Draw some images, each with the five captions that the model finds most like it; right captions are marked."""
    rows, columns, total = 6, 4, len(evaluation.predictions)
    chosen = set(random.Random(0).sample(range(total), min(rows * columns, total)))
    shown = [(index, item) for index, item in enumerate(images) if index in chosen]
    figure = Figure(figsize=(4.1 * columns, 1.55 * rows + 0.7), layout="constrained")
    accuracy = evaluation.results["zero_shot"]
    figure.suptitle(
        f"{len(shown)} of {total} validation images with their five best captions of {evaluation.results['classes']}; "
        "right ones in bold green\n"
        f"overall top-1 {100 * accuracy['top1']:.1f}%, top-5 {100 * accuracy['top5']:.1f}%"
    )
    axes = figure.subplots(rows, 2 * columns, width_ratios=(1, 2.1) * columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, (index, item) in enumerate(shown):
        picture, text = axes.flat[2 * place], axes.flat[2 * place + 1]
        picture.imshow(item.image)
        picture.set_title(shorten(item.label, 18), fontsize=8)
        for k, prediction in enumerate(evaluation.predictions[index]):
            right = evaluation.right[index][k]
            style: dict[str, Any] = {"color": RIGHT, "weight": "bold"} if right else {"color": WRONG}
            label = f"{'✓' if right else k + 1} {shorten(prediction, 30)}"
            text.text(0, 0.92 - 0.2 * k, label, fontsize=8.5, va="top", transform=text.transAxes, **style)
    save_figure(figure, path, dpi=110)


def interpolation_plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Plot zero-shot accuracy on each set over alpha; with two sets or more, also that on the others over the first's.

    Args:
        rows: as :func:`~clipfast.evaluation.interpolation.evaluate_path` yields them.
        title: of the picture.
        path: the file to write.
    """
    alphas, names = [row["alpha"] for row in rows], list(rows[0]["results"])
    top1 = {name: [100 * row["results"][name]["zero_shot"]["top1"] for row in rows] for name in names}
    figure = Figure(figsize=(6 + 5 * (len(names) > 1), 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    over_alpha, *others = figure.subplots(1, 1 + (len(names) > 1), squeeze=False)[0]
    for name in names:
        over_alpha.plot(alphas, top1[name], marker="o", label=shorten(name, 40))
    for classes in sorted({rows[0]["results"][name]["classes"] for name in names}):
        draw_chance(over_alpha, classes)
    over_alpha.set(xlabel="alpha", ylabel="zero-shot top-1, %")
    over_alpha.legend()
    for axis in others:
        axis.set(
            xlabel=f"top-1 on {shorten(names[0], 40)}, %",
            ylabel=f"top-1 on {shorten(names[1], 40) if len(names) == 2 else 'the others'}, %",
        )
        for number, name in enumerate(names[1:], 1):
            axis.plot(top1[names[0]], top1[name], marker="o", color=f"C{number}", label=shorten(name, 40))
        for alpha, x, y in zip(alphas, top1[names[0]], top1[names[1]], strict=True):
            axis.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    save_figure(figure, path)


def draw_chance(axis: Axes, classes: int) -> None:
    """Draw the accuracy by chance among so many classes as a line."""
    axis.axhline(100 / classes, linestyle=":", color=CHANCE, label=f"chance: {100 / classes:.2g}%")


def zero_shot_plot(results: dict[str, Any], classified: Classified, path: Path) -> None:
    """Plot the figures with their intervals, by templates if several were compared, by group, and of all classes.

    Args:
        results: of ``clipfast eval zeroshot``.
        classified: the classes of the images.
        path: the file to write.
    """
    groups, has_curve = results.get("by_group", {}), results["images"] > results["classes"]
    columns = 1 + bool(groups) + has_curve  # a class with one image is known, or it is not
    figure = Figure(figsize=(2 + 4.5 * columns, 4.5), layout="constrained")
    figure.suptitle(f"{shorten(results['model'], 60)} on {shorten(results['data'], 60)}", fontsize=10)
    bars, *others = figure.subplots(1, columns, squeeze=False)[0]
    sets = results.get("by_templates", {results["templates"]: results})
    names = [name for name, value in results["metrics"].items() if value is not None]
    for number, (key, found) in enumerate(sets.items()):
        shares, intervals = ([found[kind][name] for name in names] for kind in ("metrics", "intervals"))
        values, ends = [100 * share for share in shares], error_bars(shares, intervals)
        places = [place + 0.8 * (number + 0.5) / len(sets) - 0.4 for place in range(len(names))]
        count = f" ({found['templates']})" if "by_templates" in results else ""
        drawn = bars.bar(places, values, 0.75 / len(sets), label=shorten(key, 40) + count)
        bars.errorbar(places, values, ends, fmt="none", color="black", capsize=3)
        bars.bar_label(drawn, fmt="%.1f", label_type="center", color="white", fontsize=8)
    for place, name in enumerate(names):
        chance = 100 * (5 if name == "acc5" else 1) / results["classes"]
        label = "chance" if place == 0 else None
        bars.hlines(chance, place - 0.45, place + 0.45, CHANCE, ":", label=label)
    bars.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
    bars.set(ylabel="%, with 95% intervals")
    bars.legend(title="templates")
    if groups:
        _group_bars(others[0], groups, results["classes"])
    if has_curve:
        recall = (100 * recalls(classified)).sort().values.tolist()
        others[-1].step([100 * (place + 0.5) / len(recall) for place in range(len(recall))], recall, where="mid")
        others[-1].set(xlabel="classes from the worst to the best, %", ylabel="recall of the class, %", xlim=(0, 100))
        draw_chance(others[-1], results["classes"])
        others[-1].legend()
    save_figure(figure, path)


def _group_bars(axis: Axes, groups: Mapping[str, Any], classes: int) -> None:
    """Draw the accuracy of the largest groups, with intervals."""
    shown = sorted(groups.items(), key=lambda one: -one[1]["images"])[:MOST_GROUPS]
    shares = [found["top1"] for _, found in shown]
    ends = error_bars(shares, [of_share(found["top1"], found["images"]) for _, found in shown])
    axis.barh(range(len(shown)), [100 * share for share in shares])
    axis.errorbar([100 * share for share in shares], range(len(shown)), xerr=ends, fmt="none", color="black", capsize=3)
    axis.axvline(100 / classes, linestyle=":", color=CHANCE)
    axis.set_yticks(range(len(shown)), [f"{shorten(name, 28)} ({found['images']:,})" for name, found in shown])
    axis.invert_yaxis()
    axis.set(xlabel="top-1 by group (images), %", xlim=(0, None))


def retrieval_plot(results: dict[str, Any], path: Path) -> None:
    """Plot recall over k, in both directions, with its intervals; ``results`` are of ``clipfast eval retrieval``."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.set_title(f"{shorten(results['model'], 60)} on {shorten(results['data'], 60)}", fontsize=10)
    for direction in ("image_retrieval", "text_retrieval"):
        named = {int(key.rpartition("@")[2]): key for key in results["metrics"] if key.startswith(direction)}
        keys = [named[k] for k in sorted(named)]
        axis.plot(
            sorted(named), [100 * results["metrics"][key] for key in keys], "o-", label=direction.replace("_", " ")
        )
        low, high = ([100 * results["intervals"][key][end] for key in keys] for end in (0, 1))
        axis.fill_between(sorted(named), low, high, alpha=0.2)
    chances = [100 * min(1, k / results["images"]) for k in sorted(named)]
    axis.plot(sorted(named), chances, ":", color=CHANCE, label="chance, for one caption an image")
    axis.set(xlabel="k", ylabel="recall@k, %, with 95% intervals", xscale="log", ylim=(0, 100))
    axis.set_xticks(sorted(named), [str(k) for k in sorted(named)])
    axis.minorticks_off()
    axis.legend()
    save_figure(figure, path)


def shorten(text: str, length: int, *, keep_end: bool = False) -> str:
    """Return a text of at most ``length`` characters: what is longer loses its end, or its beginning."""
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if keep_end else text[: length - 1] + "…"


def error_bars(shares: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return how far intervals reach below and above shares, in percent, as matplotlib takes it."""
    # a bootstrap's interval need not hold the share itself
    below = [100 * max(0.0, share - low) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [100 * max(0.0, high - share) for share, (_, high) in zip(shares, intervals, strict=True)]
    return below, above
