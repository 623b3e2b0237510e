"""The result file of a benchmark run: JSON with every sample, the machine and the versions; see ``schema.json``."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipfast import host
from clipfast.io.files import replace_text
from clipfast.kernels.hardware import card_named

from . import machine
from .breakdown import Breakdown
from .case import OURS, Case
from .harness import Timing, ratio_interval

SCHEMA = 1
MODEL_FLOPS = "3 x forward of the published model + 6 N^2 D for the loss"
FOLDER = Path("bench/results")
SMOKE_FOLDER = Path("runs/bench")  # git ignores this folder


def new_run(device: torch.device, roofs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the result of a benchmark run that has no cases yet."""
    return conditions(device) | {"roofs": roofs, "cases": []}


def conditions(device: torch.device) -> dict[str, Any]:
    """Return the part of a benchmark result that says when, where and at which commit it was measured."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    where = {"git": host.commit(), "machine": machine.describe(device), "versions": machine.versions()}
    return {"schema": SCHEMA, "when": when, **where}


def case_result(
    case: Case,
    timings: list[Timing],
    telemetry: dict[str, Any],
    peaks: dict[str, int | str],
    roof: dict[str, float],
    breakdowns: Mapping[str, Breakdown | str] | None = None,
) -> dict[str, Any]:
    """Return one entry of a result's ``cases``, from timings, telemetry and the rates (``roof``) of this run.

    ``peaks`` and ``breakdowns`` hold for each candidate the peak memory and the breakdown, or the reason why it is
    missing.
    """
    ours = next((t for t in timings if t.candidate.name == OURS and t.samples), None)
    floor_s = case.floor.seconds(roof["matmul_flops_per_s"], roof["copy_bytes_per_s"]) if case.floor else None
    result: dict[str, Any] = {
        "suite": case.suite, "op": case.op, "shape": dict(case.shape), "dtype": case.dtype,
        "items": {"count": case.items[0], "unit": case.items[1]},
        "floor": {"flops": case.floor.flops, "bytes": case.floor.bytes, "seconds": floor_s} if case.floor else None,
        "telemetry": telemetry,
        "candidates": [_candidate_result(t, ours, peaks.get(t.candidate.name), floor_s) for t in timings],
    }  # fmt: skip
    for entry in result["candidates"]:
        breakdown = (breakdowns or {}).get(entry["name"])
        if isinstance(breakdown, str):
            entry["breakdown_refused"] = breakdown
        elif breakdown is not None:
            entry["breakdown"] = {**vars(breakdown), "unknown": dict(breakdown.unknown)}
    if case.model_flops:
        _add_utilisation(result, case, roof["matmul_flops_per_s"])
    return result


def _add_utilisation(result: dict[str, Any], case: Case, measured: float) -> None:
    """Add the MFU of each timed candidate, against the peak measured in this run and against the data sheet's."""
    card = card_named(torch.cuda.get_device_name(case.device)) if case.device.type == "cuda" else None
    peaks = {"measured": measured, "data_sheet": None if card is None else card.peak(half=case.dtype != "fp32")}
    result["model_flops"] = {"value": case.model_flops, "definition": MODEL_FLOPS, "peak_flops_per_s": peaks}
    for entry in result["candidates"]:
        if entry["samples_s"]:
            entry["mfu"] = {
                name: case.model_flops / entry["median_s"] / peak if peak else None for name, peak in peaks.items()
            }


def _candidate_result(
    timing: Timing, ours: Timing | None, peak: int | str | None, floor_s: float | None
) -> dict[str, Any]:
    """Return the entry of one candidate in a benchmark result."""
    result: dict[str, Any] = {
        "name": timing.candidate.name, "note": timing.candidate.note, "refused": timing.refused,
        # JSON has no NaN, so an error that is NaN becomes null.
        "errors": {name: error if math.isfinite(error) else None for name, error in timing.errors.items()},
        "peak_bytes": peak if isinstance(peak, int) else None,
        "peak_refused": peak if isinstance(peak, str) else None,
        "timer": timing.timer, "eager": timing.eager, "samples_s": timing.samples,
    }  # fmt: skip
    if timing.samples:
        points = np.quantile(timing.samples, [0.05, 0.2, 0.5, 0.8, 0.95]).tolist()
        result |= dict(zip(("p5_s", "p20_s", "median_s", "p80_s", "p95_s"), points, strict=True))
        if floor_s is not None:
            result["share_of_floor"] = floor_s / result["median_s"]
        if ours is not None and ours is not timing:
            interval = ratio_interval(ours.samples, timing.samples)
            result["times_ours"] = dict(zip(("median", "low", "high"), interval, strict=True))
    return result


def default_path(device: torch.device, suite: str, *, smoke: bool = False) -> Path:
    """Return ``bench/results/<card>/<date>-<suite>-<commit>.json``; with ``smoke``, a path in ``runs/bench``."""
    sha = (host.commit()["sha"] or "unknown")[:8]
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return (SMOKE_FOLDER if smoke else FOLDER) / machine.card(device) / f"{day}-{suite}-{sha}.json"


def write(run: dict[str, Any], path: Path) -> None:
    """Write the result ``run`` to ``path`` atomically, so that a measurement that is stopped leaves a complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(run, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a benchmark's result file.

    Raises:
        ValueError: the file is no result, or is of another schema.
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    return run
