"""The plots of ``clipfast eval ... --plot``, made from results; ``robustness_plots`` has those of eval robustness."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..io.files import save_figure
from .classification import Classified, recalls
from .compositional_scores import MEAN
from .intervals import of_share
from .overlap_pairs import LEVEL, Pairs
from .pictures import CHANCE, bars, draw_chance, error_bars, new_figure, shorten, title_of
from .suite import label

MOST = 25  # a plot has bars for at most this many groups or queries, the largest ones


def zeroshot_plot(results: dict[str, Any], classified: Classified, path: Path) -> None:
    """Plot zero-shot results: metrics (by templates if several were compared), groups, and the recall of each class."""
    groups, classes = results.get("by_group", {}), results["classes"]
    has_curve = results["images"] > classes  # with one image per class, every recall is 0 or 1
    columns = 1 + bool(groups) + has_curve
    figure = new_figure(2 + 4.5 * columns, 4.5, title_of(results))
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    names = [name for name, value in results["metrics"].items() if value is not None]
    sets = results.get("by_templates", {results["templates"]: results})
    by_chance = [(5 if name == "acc5" else 1) / classes for name in names]
    series = {shorten(key, 40): _figures([found], names) for key, found in sets.items()}
    bars(axes[0], [name.replace("_", " ") for name in names], series, dict.fromkeys(series, by_chance))
    axes[0].set(ylabel="%, with 95% intervals")
    if groups:
        shown = sorted(groups.items(), key=lambda one: -one[1]["images"])[:MOST]
        top1 = [(found["top1"], of_share(found["top1"], found["images"])) for _, found in shown]
        labels = [f"{shorten(name, 28)} ({found['images']:,})" for name, found in shown]
        bars(axes[1], labels, {"top-1": top1}, {"top-1": [1 / classes] * len(shown)})
        axes[1].set(xlabel="group (images)", ylabel="top-1, %, with 95% intervals")
    if has_curve:
        recall = (100 * recalls(classified)).sort().values.tolist()
        axes[-1].step([100 * (place + 0.5) / len(recall) for place in range(len(recall))], recall, where="mid")
        axes[-1].set(xlabel="classes from the worst to the best, %", ylabel="recall of the class, %", xlim=(0, 100))
        draw_chance(axes[-1], classes)
        axes[-1].legend(fontsize=8)
    save_figure(figure, path)


def _figures(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Any]:
    """Return (metric, interval) for each of the metrics ``names`` in each row of results, as ``bars`` takes them."""
    return [(row["metrics"][name], row["intervals"][name]) for row in rows for name in names]


def retrieval_plot(results: dict[str, Any], path: Path) -> None:
    """Plot retrieval recall over k, in both directions, with its intervals."""
    figure = new_figure(6.5, 4.5, title_of(results))
    axis = figure.subplots()
    ks = sorted({int(name.rpartition("@")[2]) for name in results["metrics"]})
    for direction in ("image retrieval", "text retrieval"):
        names = [f"{direction.replace(' ', '_')}_recall@{k}" for k in ks]
        shares, intervals = zip(*_figures([results], names), strict=True)
        axis.errorbar(
            ks, [100 * x for x in shares], error_bars(shares, intervals), fmt="o-", capsize=3, label=direction
        )
    chances = [100 * min(1, k / results["images"]) for k in ks]
    axis.plot(ks, chances, ":", color=CHANCE, label="chance, for one caption an image")
    axis.set(xlabel="k", ylabel="recall@k, %, with 95% intervals", xscale="log", ylim=(0, 100))
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.legend()
    save_figure(figure, path)


def probe_plot(results: dict[str, Any], path: Path) -> None:
    """Plot probe accuracy over the training images per class, beside zero-shot, like figure 6 of the CLIP paper."""
    curve = results["few_shot"]
    places = range(1, len(curve) + 1)
    zero_shot, full = 100 * results["zero_shot"]["metrics"]["acc1"], 100 * results["metrics"]["lp_acc1"]
    figure = new_figure(7, 5, title_of(results))
    axis = figure.subplots()
    axis.axhline(zero_shot, linestyle="--", color="tab:red", linewidth=1)
    axis.plot(0, zero_shot, "*", markersize=14, color="tab:red", label=f"zero-shot: {zero_shot:.1f}%")
    means = [100 * found["acc1"]["mean"] for found in curve]
    spreads = [100 * (found["acc1"]["std"] or 0) for found in curve]
    label = f"linear probe, mean and standard deviation of {len(curve[0]['draws'])} draws"
    axis.errorbar(places, means, yerr=spreads, marker="o", capsize=3, color="tab:blue", label=label)
    axis.plot(len(curve) + 1, full, "s", color="tab:green", label=f"linear probe, all images: {full:.1f}%")
    axis.set_xticks(range(len(curve) + 2), ["0", *(str(found["fewshot_k"]) for found in curve), "all"])
    axis.set(xlabel="labelled training images per class", ylabel="test accuracy, %")
    axis.set_ylim(bottom=0)
    draw_chance(axis, results["classes"])
    figure.legend(loc="outside lower center")
    save_figure(figure, path)


def compositional_plot(results: dict[str, Any], path: Path) -> None:
    """Plot compositional accuracy of each group beside chance."""
    divisions = results["groups"] or {"": {"all cases": results}}
    names = [name for name in results["metrics"] if name != MEAN]
    counts = [min(MOST, len(groups)) for groups in divisions.values()]
    figure = new_figure(max(6.0, 2 + 0.95 * sum(counts)), 4.6, f"{title_of(results)}: {results['cases']:,} cases")
    axes = figure.subplots(1, len(counts), width_ratios=counts, squeeze=False, sharey=True)[0]
    for axis, (division, groups) in zip(axes, divisions.items(), strict=True):
        shown = dict(sorted(groups.items(), key=lambda one: -one[1]["cases"])[:MOST])
        series = {name: _figures(list(shown.values()), [name]) for name in names}
        chances = {name: [found["chance"][name] for found in shown.values()] for name in names}
        bars(axis, [shorten(name, 30) for name in shown], series, chances)
        axis.set_xlabel(division)
    axes[0].set(ylabel="right, %, with 95% intervals", ylim=(0, 104))
    save_figure(figure, path)


def overlap_plot(results: dict[str, Any], pairs: Pairs, path: Path) -> None:
    """Plot the similarities of test images to training images, and the accuracy on near duplicates and other images."""
    figure = new_figure(11, 4.5, f"{title_of(results)}, against {shorten(results['train_data'], 60)}")
    similarities, accuracy = figure.subplots(1, 2, width_ratios=(3, 2))
    similarities.hist(pairs.similarity.tolist(), bins=60, log=True)
    similarities.axvline(results["threshold"], linestyle="--", color=CHANCE)
    share = f"{results['metrics']['overlap']:.1%} of test images at {results['threshold']:g} or above"
    similarities.set(title=share, xlabel=f"similarity to the nearest training image, by {results['by']}")
    similarities.set_ylabel("test images")
    keys = {"all": "acc1", "overlap": "acc1_overlap", "clean": "acc1_clean"}
    shown = {name: key for name, key in keys.items() if results["metrics"][key] is not None}
    labels = [f"{name}\n({results['images'][name]:,})" for name in shown]
    chances = {"acc1": [1 / results["classes"]] * len(shown)}
    bars(accuracy, labels, {"acc1": _figures([results], list(shown.values()))}, chances)
    accuracy.set(ylabel=f"zero-shot accuracy, %\nintervals of 95%, overlap {LEVEL:.1%}")
    save_figure(figure, path)


def bias_plot(results: dict[str, Any], path: Path) -> None:
    """Plot bias results for each key: accuracy by group, the share of each category of added labels, and skew."""
    keys = results["by_key"]
    has_queries = any("retrieval" in found for found in keys.values())
    columns = 1 + bool(results["added_labels"]) + has_queries
    figure = new_figure(5.2 * columns, 4.2 * len(keys) + 0.4, title_of(results))
    for axes, (key, found) in zip(figure.subplots(len(keys), columns, squeeze=False), keys.items(), strict=True):
        names = [f"{shorten(name, 28)} ({count:,})" for name, count in found["images"].items()]
        kinds: dict[str, dict[str, Any]] = {"accuracy": {"acc1": found["acc1"]}, "categories": found["categories"]}
        for axis, (kind, compared) in zip(axes, kinds.items(), strict=False):
            if compared:
                series = {name: _shares(one) for name, one in compared.items()}
                chances = {"acc1": [1 / results["classes"]] * len(names)} if kind == "accuracy" else None
                bars(axis, names, series, chances)
                axis.set(title=f"{kind} by {key}", ylabel="%, with 95% intervals")
        if has_queries:
            last = found["retrieval"][-1]
            rows = sorted(last["queries"], key=lambda row: row["max_skew"])[-MOST:]
            queries = [f"{shorten(row['query'], 28)}: {shorten(row['max_skew_group'], 16)}" for row in rows]
            axes[-1].barh(queries, [row["max_skew"] for row in rows], color="tab:purple")
            axes[-1].axvline(last["max_skew_by_chance"], linestyle="--", color=CHANCE, label="mean by chance")
            axes[-1].set_xlabel(f"MaxSkew@{last['k']}, and its group")
            axes[-1].legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def _shares(compared: Mapping[str, Any]) -> list[Any]:
    """Return (share, interval) of each group in a comparison of the bias results, as ``bars`` takes them."""
    return [(row["share"], row["interval"]) for row in compared["groups"].values()]


def suite_figure(results: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Plot the results of a suite: the main metrics of each set and model, with their intervals.

    Args:
        results: the results of ``clipfast eval suite``.
        rows: the rows of its table.
    """
    models = [label(model["model"], model["pretrained"]) for model in results["models"]]
    count = max(1, len(rows))
    figure = new_figure(8.5, 1.6 + 0.22 * count * (1 + 0.4 * len(models)))
    axis = figure.subplots()
    for number, model in enumerate(models):
        shift = 0.7 * ((number + 0.5) / len(models) - 0.5)
        drawn = [(place + shift, *row["values"][number]) for place, row in enumerate(rows) if row["values"][number]]
        places, shares, intervals = zip(*drawn, strict=True) if drawn else ((), (), ())
        ends = error_bars(shares, intervals)
        axis.errorbar([100 * x for x in shares], places, xerr=ends, fmt="o", capsize=2, label=shorten(model, 60))
    axis.set_yticks(range(len(rows)), [f"{shorten(row['set'], 40)}: {row['metric'].replace('_', ' ')}" for row in rows])
    axis.set(xlabel="%, with 95% intervals", xlim=(0, 100), ylim=(count - 0.5, -0.5))
    axis.grid(axis="both", alpha=0.3)
    figure.legend(loc="outside lower center")
    return figure
