"""Tables of benchmark results: the one printed after each case, and those in the documentation, from committed
results.
"""

import re
from pathlib import Path
from typing import Any

from clipfast.io.text import align
from clipfast.io.units import BYTES, SECONDS, scaled

from . import results
from .case import OURS
from .categories import CATEGORIES, HOST


def sizes(case: dict[str, Any]) -> str:
    """Return the sizes of a benchmark case in one line, such as ``pairs=4096 embed_dim=512``."""
    return " ".join(f"{key}={value}" for key, value in case["shape"].items())


def case_table(case: dict[str, Any]) -> str:
    """Return the table of one case: a row for each candidate, and notes on candidates that were measured
    differently.
    """
    head = f"{case['op']}  {sizes(case)}  {case['dtype']}"
    if case["floor"]:
        head += f"   floor {scaled(case['floor']['seconds'], SECONDS)}"
    if case["telemetry"]["throttled"]:
        head += "   THROTTLED: no verdict"
    rows = [["", "time", "p20..p80", "x ours [95%]", "of floor", "peak memory", f"{case['items']['unit']}/s"]]
    rows[0] += ["MFU"] if "model_flops" in case else []
    remarks = []
    for candidate in case["candidates"]:
        if candidate["refused"]:
            remarks.append(f"  not timed: {candidate['name']}: {candidate['refused']}")
            continue
        rows.append(_row(candidate, case))
        if candidate.get("eager"):
            remarks.append(f"  host included, no CUDA graph: {candidate['name']}: {candidate['eager']}")
        if candidate.get("peak_refused"):
            remarks.append(f"  no memory figure: {candidate['name']}: {candidate['peak_refused']}")
    table = align(rows, right=range(1, len(rows[0])), indent="  ")
    return "\n".join([head, table, *remarks, *_utilisation(case), *_breakdown(case)])


def _utilisation(case: dict[str, Any]) -> list[str]:
    """Return notes on the peak rates that the table's MFU refers to."""
    if "model_flops" not in case:
        return []
    flops, peaks = case["model_flops"], case["model_flops"]["peak_flops_per_s"]
    against = f"{peaks['measured'] / 1e12:.3g} TFLOP/s measured in this run"
    if peaks["data_sheet"]:
        against += f" (in brackets: {peaks['data_sheet'] / 1e12:.4g} of the data sheet)"
    return [f"  MFU: {flops['value'] / 1e9:.4g} GFLOP, {flops['definition']}, against {against}"]


def _breakdown(case: dict[str, Any]) -> list[str]:
    """Return the table of time by category, one row for each candidate, and the names that belong to no category."""
    rows, remarks = [], []
    found = [c for c in case["candidates"] if c.get("breakdown")]
    used = [name for name in CATEGORIES if name == HOST or any(c["breakdown"]["seconds"][name] for c in found)]
    for candidate in case["candidates"]:
        if reason := candidate.get("breakdown_refused"):
            remarks.append(f"  no breakdown: {candidate['name']}: {reason}")
        if breakdown := candidate.get("breakdown"):
            step_s = breakdown["step_s"]
            shares = [f"{100 * breakdown['seconds'][name] / step_s:.1f}%" for name in used]
            rows.append([candidate["name"], scaled(step_s, SECONDS), *shares, scaled(breakdown["traced_s"], SECONDS)])
            unknown = [f"{name[:80]} {100 * s / step_s:.2f}%" for name, s in breakdown["unknown"].items()]
            remarks += [f"  in other, {candidate['name']}: {', '.join(unknown)}"] if unknown else []
    head = ["where the time goes", "step", *used, "traced"]
    return [*([align([head, *rows], right=range(1, len(head)), indent="  ")] if rows else []), *remarks]


def _row(candidate: dict[str, Any], case: dict[str, Any]) -> list[str]:
    """Return a candidate's row in the table of a benchmark case."""
    ratio = candidate.get("times_ours")
    share = candidate.get("share_of_floor")
    return [
        candidate["name"] + (" *" if candidate["note"] else "") + (" (eager)" if candidate.get("eager") else ""),
        scaled(candidate["median_s"], SECONDS),
        f"{scaled(candidate['p20_s'], SECONDS)}..{scaled(candidate['p80_s'], SECONDS)}",
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
        f"{100 * share:.0f}%" if share is not None else "",
        _memory(candidate["peak_bytes"]),
        _rate(case["items"]["count"] / candidate["median_s"]),
        *([_mfu(candidate["mfu"])] if "mfu" in candidate else []),
    ]


def _rate(per_s: float) -> str:
    """Return a benchmark's throughput as text."""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.3g}"


def _mfu(mfu: dict[str, float | None]) -> str:
    """Return the MFU against the measured and the data sheet's peak as text."""
    measured, data_sheet = mfu["measured"] or 0.0, mfu["data_sheet"]
    return f"{100 * measured:.1f}%" + (f" ({100 * data_sheet:.1f}%)" if data_sheet else "")


def _memory(value: int | None) -> str:
    """Return a benchmark's peak memory with its unit, or ``-`` for None."""
    return "-" if value is None else scaled(value, BYTES)


def page_table(runs: list[dict[str, Any]]) -> str:
    """Return a table of our times and OpenCLIP's: for the loss by batch size, or for training steps by model.

    If OpenCLIP was not measured, for example because memory was too small, its columns have a dash.
    """
    cases = [case for run in runs for case in run["cases"]]
    is_step = all(case["suite"] == "step" for case in cases)
    rates = ["pairs/s", "MFU"] if is_step else []
    columns = ["model, batch" if is_step else "pairs", "clipfast", "OpenCLIP", "times faster (95%)", *rates]
    rows = [[*columns, "memory", "OpenCLIP"], ["---"] * (len(columns) + 2)]
    for case in cases:
        by_name = {c["name"]: c for c in case["candidates"] if not c["refused"]}
        ours, theirs = by_name.get(OURS), by_name.get("OpenCLIP" if is_step else "OpenCLIP ClipLoss")
        if case["suite"] not in ("loss", "step") or ours is None:
            continue
        shape, ratio = case["shape"], theirs["times_ours"] if theirs else None
        rates = [_rate(case["items"]["count"] / ours["median_s"]), _mfu(ours["mfu"])] if is_step else []
        rows.append(
            [
                f"{shape['model']}, {shape['batch']:,}" if is_step else f"{shape['pairs']:,}",
                *(scaled(c["median_s"], SECONDS) if c else "-" for c in (ours, theirs)),
                f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "-",
                *rates,
                *(_memory(c["peak_bytes"] if c else None) for c in (ours, theirs)),
            ]
        )
    widths = {str(case["shape"]["embed_dim"]) for case in cases if "embed_dim" in case["shape"]}
    facts = [f"D = {_joined(widths)}"] if widths else []
    facts.append(_joined({case["dtype"] for case in cases}))
    where = _joined({run["machine"].get("gpu") or run["machine"]["cpu"] for run in runs})
    return "\n".join([*_markdown(rows), "", _caption(runs, where, facts)])


def host_table(run: dict[str, Any]) -> str:
    """Return a table of the time that the host takes for our calls and for those of others, from ``bench host``."""
    rows = [["call", OURS, "others", "times as long as", "kernels, theirs"], ["---"] * 5]
    for row in run["rows"]:
        found, against = row["found"], row["against"]
        ours, theirs = found[OURS], found[against]
        ratios = " / ".join(f"{us / theirs[kind][0]:.2f}" for kind, (us, _) in ours.items())
        others = ", ".join(f"{name} {_microseconds(one)}" for name, one in found.items() if OURS not in name)
        counts = ", ".join(" / ".join(str(kernels) for _, kernels in one.values()) for one in (ours, theirs))
        shape = {size: value for size, value in row["shape"].items() if not isinstance(value, float)}
        rows.append(
            [f"{row['name']} {sizes({'shape': shape})}", _microseconds(ours), others, f"{against} {ratios}", counts]
        )
    where = f"{run['machine']['cpu']}; {run['place']}; Triton {run['versions']['triton']}"
    return "\n".join([*_markdown(rows), "", _caption([run], where, [run["dtype"]])])


def _microseconds(found: dict[str, tuple[float, int]]) -> str:
    """Return the host's microseconds for each measured pass of a candidate, such as ``25.3 / 141``."""
    return " / ".join(f"{us:.3g}" if us < 100 else f"{us:,.0f}" for us, _ in found.values())


def _markdown(rows: list[list[str]]) -> list[str]:
    """Return the Markdown lines of a page's table of benchmark results; a row of "---" is the line below the head."""
    return [f"|{'|'.join(row)}|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in rows]


def _joined(values: set[str]) -> str:
    """Return the different values of several benchmark runs as one text, for the caption of a page's table."""
    return ", ".join(sorted(values))


def _caption(runs: list[dict[str, Any]], where: str, facts: list[str]) -> str:
    """Return the caption of a page's table: machine, versions, commit and date of the measurements ``runs``."""
    torch, open_clip = (
        _joined({run["versions"][name] or "not installed" for run in runs}) for name in ("torch", "open_clip_torch")
    )
    when, commit = (
        _joined({run["when"][:10] for run in runs}),
        _joined({(run["git"]["sha"] or "unknown")[:8] for run in runs}),
    )
    return f"{where}; torch {torch}, OpenCLIP {open_clip}; {', '.join(facts)}; {when}, commit {commit}."


def fill_tables(text: str, folder: Path) -> str:
    """Return the page ``text`` with each benchmark table, ``<!-- bench FILE... -->`` to ``<!-- /bench -->``, made anew.

    The files are results in ``folder``; several may hold the training steps of one table. A file of ``bench host`` has
    a table of its own.
    """

    def block(match: re.Match[str]) -> str:
        """Return a page's benchmark table, made anew from the results of the named files."""
        runs = [results.read(folder / name) for name in match[1].split()]
        table = host_table(runs[0]) if "rows" in runs[0] else page_table(runs)
        return f"<!-- bench {match[1]} -->\n{table}\n<!-- /bench -->"

    return re.sub(r"<!-- bench (.+?) -->.*?<!-- /bench -->", block, text, flags=re.S)
