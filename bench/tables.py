"""Results as text: the table after a run, and the tables that the README takes from committed results."""

import re
from pathlib import Path
from typing import Any

from .case import OURS

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def case_table(case: dict[str, Any]) -> str:
    """One case: a line for each candidate; below, what could not run, and whose figures are not like the others'."""
    shape = " ".join(f"{key}={value}" for key, value in case["shape"].items())
    head = f"{case['op']}  {shape}  {case['dtype']}"
    if case["floor"]:
        head += f"   floor {seconds(case['floor']['seconds'])}"
    if case["telemetry"]["throttled"]:
        head += "   THROTTLED: no verdict"
    rows = [["", "time", "p20..p80", "x ours [95%]", "of floor", "peak memory", f"{case['items']['unit']}/s"]]
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
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([head, *(f"  {line}" for line in lines), *remarks])


def _row(candidate: dict[str, Any], case: dict[str, Any]) -> list[str]:
    ratio = candidate.get("times_ours")
    share = candidate.get("share_of_floor")
    return [
        candidate["name"] + (" *" if candidate["note"] else "") + (" (eager)" if candidate.get("eager") else ""),
        seconds(candidate["median_s"]),
        f"{seconds(candidate['p20_s'])}..{seconds(candidate['p80_s'])}",
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
        f"{100 * share:.0f}%" if share is not None else "",
        size(candidate["peak_bytes"]),
        f"{case['items']['count'] / candidate['median_s']:,.0f}",
    ]


def seconds(value: float) -> str:
    """``0.0123`` as ``12.3 ms``."""
    for factor, unit in UNITS:
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: int | None) -> str:
    """Bytes as ``12.3 MiB``."""
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def loss_table(run: dict[str, Any]) -> str:
    """Markdown for the README: the loss against OpenCLIP's, by batch."""
    lines = ["| pairs | clipfast | OpenCLIP | times faster (95%) | memory | OpenCLIP |", "|---|---|---|---|---|---|"]
    for case in run["cases"]:
        by_name = {c["name"]: c for c in case["candidates"] if not c["refused"]}
        ours, theirs = by_name.get(OURS), by_name.get("OpenCLIP ClipLoss")
        if case["suite"] != "loss" or ours is None or theirs is None:
            continue
        ratio = theirs["times_ours"]
        lines.append(
            f"| {case['shape']['pairs']:,} | {seconds(ours['median_s'])} | {seconds(theirs['median_s'])} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}) "
            f"| {size(ours['peak_bytes'])} | {size(theirs['peak_bytes'])} |"
        )
    where = run["machine"].get("gpu") or run["machine"]["cpu"]
    versions = run["versions"]
    caption = (
        f"{where}; torch {versions['torch']}, OpenCLIP {versions['open_clip_torch']}; D = "
        f"{', '.join(sorted({str(c['shape']['embed_dim']) for c in run['cases'] if c['suite'] == 'loss'}))}, "
        f"{', '.join(sorted({c['dtype'] for c in run['cases'] if c['suite'] == 'loss'}))}; {run['when'][:10]}, "
        f"commit {(run['git']['sha'] or 'unknown')[:8]}."
    )
    return "\n".join([*lines, "", caption])


def fill_readme(text: str, folder: Path, read: Any) -> str:
    """``text`` with each block between ``<!-- bench FILE -->`` and ``<!-- /bench -->`` made anew from that file in
    ``folder``.
    """

    def block(match: re.Match[str]) -> str:
        return f"<!-- bench {match[1]} -->\n{loss_table(read(folder / match[1]))}\n<!-- /bench -->"

    return re.sub(r"<!-- bench (\S+) -->.*?<!-- /bench -->", block, text, flags=re.S)
