"""Results as text: the table after a run, and the tables that the README takes from committed results."""

import re
from pathlib import Path
from typing import Any

from .case import OURS
from .categories import CATEGORIES, HOST

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
    return "\n".join([head, *_aligned(rows), *remarks, *_utilisation(case), *_breakdown(case)])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _utilisation(case: dict[str, Any]) -> list[str]:
    """What MFU means here, and what crosses to the device."""
    lines = []
    if flops := case.get("model_flops"):
        peaks = flops["peak_flops_per_s"]
        against = f"{peaks['measured'] / 1e12:.3g} TFLOP/s measured in this run"
        if peaks["data_sheet"]:
            against += f" (in brackets: {peaks['data_sheet'] / 1e12:.4g} of the data sheet)"
        lines.append(f"  MFU: {flops['value'] / 1e9:.4g} GFLOP, {flops['definition']}, against {against}")
    if transfers := case.get("transfers"):
        parts = [
            f"{size(entry['bytes'])} with {pixels} pixels"
            + (f" ({seconds(entry['seconds'])})" if entry["seconds"] is not None else "")
            for pixels, entry in transfers.items()
        ]
        lines.append(f"  to the device in a step, before the time begins: {', '.join(parts)}")
    return lines


def _breakdown(case: dict[str, Any]) -> list[str]:
    """Where the time goes: a line for each candidate, and the names that no rule knows."""
    found = [c for c in case["candidates"] if c.get("breakdown")]
    remarks = [
        f"  no breakdown: {c['name']}: {c['breakdown_refused']}"
        for c in case["candidates"]
        if c.get("breakdown_refused")
    ]
    if not found:
        return remarks
    used = [name for name in CATEGORIES if name == HOST or any(c["breakdown"]["seconds"][name] for c in found)]
    rows = [["where the time goes", "step", *used, "traced"]]
    for candidate in found:
        breakdown = candidate["breakdown"]
        step_s = breakdown["step_s"]
        shares = [f"{100 * breakdown['seconds'][name] / step_s:.1f}%" for name in used]
        rows.append([candidate["name"], seconds(step_s), *shares, seconds(breakdown["traced_s"])])
        unknown = [f"{name[:80]} {100 * s / step_s:.2f}%" for name, s in breakdown["unknown"].items()]
        if unknown:
            remarks.append(f"  in other, {candidate['name']}: {', '.join(unknown)}")
    return [*_aligned(rows), *remarks]


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
        _rate(case["items"]["count"] / candidate["median_s"]),
        *([_mfu(candidate["mfu"])] if "mfu" in candidate else []),
    ]


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.3g}"


def _mfu(mfu: dict[str, float | None]) -> str:
    measured, data_sheet = mfu["measured"] or 0.0, mfu["data_sheet"]
    return f"{100 * measured:.1f}%" + (f" ({100 * data_sheet:.1f}%)" if data_sheet else "")


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
    return "\n".join([*lines, "", _caption([run], [f"D = {_sizes(run, 'embed_dim')}"])])


def step_table(runs: list[dict[str, Any]]) -> str:
    """Markdown for the README: steps of training against OpenCLIP's, by model."""
    lines = [
        "| model, batch | clipfast | OpenCLIP | times faster (95%) | pairs/s | MFU | memory | OpenCLIP |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in (case for run in runs for case in run["cases"]):
        by_name = {c["name"]: c for c in case["candidates"] if not c["refused"]}
        ours, theirs = by_name.get(OURS), by_name.get("OpenCLIP")
        if case["suite"] != "step" or ours is None or theirs is None:
            continue
        ratio = theirs["times_ours"]
        lines.append(
            f"| {case['shape']['model']}, {case['shape']['batch']:,} "
            f"| {seconds(ours['median_s'])} | {seconds(theirs['median_s'])} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f}) "
            f"| {_rate(case['items']['count'] / ours['median_s'])} | {_mfu(ours['mfu'])} "
            f"| {size(ours['peak_bytes'])} | {size(theirs['peak_bytes'])} |"
        )
    return "\n".join([*lines, "", _caption(runs, [])])


def _sizes(run: dict[str, Any], field: str) -> str:
    return ", ".join(sorted({str(case["shape"][field]) for case in run["cases"] if field in case["shape"]}))


def _caption(runs: list[dict[str, Any]], facts: list[str]) -> str:
    """Where, with what, and when; of several runs, of those that were on one machine with the same packages."""

    def one(values: set[str]) -> str:
        return ", ".join(sorted(values))

    where = one({run["machine"].get("gpu") or run["machine"]["cpu"] for run in runs})
    torch, open_clip = (one({run["versions"][name] for run in runs}) for name in ("torch", "open_clip_torch"))
    facts = [*facts, one({case["dtype"] for run in runs for case in run["cases"]})]
    when, commit = one({run["when"][:10] for run in runs}), one({(run["git"]["sha"] or "unknown")[:8] for run in runs})
    return f"{where}; torch {torch}, OpenCLIP {open_clip}; {', '.join(facts)}; {when}, commit {commit}."


def fill_readme(text: str, folder: Path, read: Any) -> str:
    """``text`` with each block between ``<!-- bench FILE... -->`` and ``<!-- /bench -->`` made anew from those files in
    ``folder``: of the loss, or of steps, which may be in several.
    """

    def block(match: re.Match[str]) -> str:
        runs = [read(folder / name) for name in match[1].split()]
        steps = all(case["suite"] == "step" for run in runs for case in run["cases"])
        table = step_table(runs) if steps else loss_table(*runs)
        return f"<!-- bench {match[1]} -->\n{table}\n<!-- /bench -->"

    return re.sub(r"<!-- bench (.+?) -->.*?<!-- /bench -->", block, text, flags=re.S)
