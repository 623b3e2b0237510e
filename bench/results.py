"""One JSON file per run: what was measured, on what, sample by sample. ``schema.json`` describes it."""

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import machine
from .breakdown import Breakdown
from .case import DTYPES, OURS, Case
from .flops import DEFINITION, data_sheet_flops_per_s
from .harness import Timing, ratio_interval

SCHEMA = 1
FOLDER = Path("bench/results")
SMOKE_FOLDER = Path("runs/bench")  # what git ignores


def new_run(device: torch.device, roofs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A result without cases yet."""
    return {
        "schema": SCHEMA,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": machine.commit(),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "roofs": roofs,
        "cases": [],
    }


def case_result(
    case: Case,
    timings: list[Timing],
    telemetry: dict[str, Any],
    peaks: dict[str, int | str],
    roof: dict[str, float],
    breakdowns: Mapping[str, Breakdown | str] | None = None,
    transfers: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """One entry of ``cases``.

    Args:
        peaks: bytes by candidate, or why there is no figure.
        breakdowns: where the time goes by candidate, or why that is not known.
        transfers: seconds of each of the case's ``transfers``; None where nothing crosses, or does not fit.
    """
    ours = next((t for t in timings if t.candidate.name == OURS and t.samples), None)
    floor_s = case.floor.seconds(roof["matmul_flops_per_s"], roof["copy_bytes_per_s"]) if case.floor else None
    result: dict[str, Any] = {
        "suite": case.suite,
        "op": case.op,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "items": {"count": case.items[0], "unit": case.items[1]},
        "floor": {"flops": case.floor.flops, "bytes": case.floor.bytes, "seconds": floor_s} if case.floor else None,
        "telemetry": telemetry,
        "candidates": [_candidate_result(t, ours, peaks.get(t.candidate.name), floor_s) for t in timings],
    }
    for entry in result["candidates"]:
        _add_breakdown(entry, (breakdowns or {}).get(entry["name"]))
    if case.model_flops:
        _add_utilisation(result, case, roof["matmul_flops_per_s"])
    if transfers:
        result["transfers"] = {
            name: {"bytes": size, "seconds": transfers[name]} for name, size in case.transfers.items()
        }
    return result


def _add_utilisation(result: dict[str, Any], case: Case, measured: float) -> None:
    """MFU of each candidate that was timed, against the peak measured in this run and the data sheet's."""
    is_gpu = case.device.type == "cuda"
    data_sheet = data_sheet_flops_per_s(torch.cuda.get_device_name(case.device), case.dtype) if is_gpu else None
    peaks = {"measured": measured, "data_sheet": data_sheet}
    result["model_flops"] = {"value": case.model_flops, "definition": DEFINITION, "peak_flops_per_s": peaks}
    for entry in result["candidates"]:
        if entry["samples_s"]:
            entry["mfu"] = {
                name: case.model_flops / entry["median_s"] / peak if peak else None for name, peak in peaks.items()
            }


def _add_breakdown(entry: dict[str, Any], breakdown: Breakdown | str | None) -> None:
    if isinstance(breakdown, str):
        entry["breakdown_refused"] = breakdown
    elif breakdown is not None:
        entry["breakdown"] = {
            "step_s": breakdown.step_s,
            "traced_s": breakdown.traced_s,
            "seconds": breakdown.seconds,
            "unknown": dict(breakdown.unknown),
        }


def _candidate_result(
    timing: Timing, ours: Timing | None, peak: int | str | None, floor_s: float | None
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "name": timing.candidate.name,
        "note": timing.candidate.note,
        "refused": timing.refused,
        # JSON has no NaN
        "errors": {name: error if math.isfinite(error) else None for name, error in timing.errors.items()},
        "peak_bytes": peak if isinstance(peak, int) else None,
        "peak_refused": peak if isinstance(peak, str) else None,
        "timer": timing.timer,
        "eager": timing.eager,
        "phases_s": timing.phases,
        "samples_s": timing.samples,
    }
    if timing.samples:
        points = np.quantile(timing.samples, [0.05, 0.2, 0.5, 0.8, 0.95]).tolist()
        result |= dict(zip(("p5_s", "p20_s", "median_s", "p80_s", "p95_s"), points, strict=True))
        if floor_s is not None:
            result["share_of_floor"] = floor_s / result["median_s"]
        if ours is not None and ours is not timing:
            result["times_ours"] = dict(
                zip(("median", "low", "high"), ratio_interval(ours.samples, timing.samples), strict=True)
            )
    return result


def default_path(device: torch.device, suite: str, *, smoke: bool = False) -> Path:
    """``bench/results/<card>/<date>-<suite>-<commit>.json`` under the current folder, or ``runs/bench``."""
    sha = (machine.commit()["sha"] or "unknown")[:8]
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return (SMOKE_FOLDER if smoke else FOLDER) / machine.card(device) / f"{day}-{suite}-{sha}.json"


def write(run: dict[str, Any], path: Path) -> None:
    """Write ``run`` whole or not at all: a measurement that is stopped keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")
    os.replace(scratch, path)


def read(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: not a result, or of another schema.
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    return run


def dtypes_of(names: list[str]) -> list[str]:
    """Check names of dtypes.

    Raises:
        ValueError: an unknown one.
    """
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return names
