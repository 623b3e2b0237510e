"""Golden curves: ``clipfast verify --golden FILE`` compares the losses and gradient norms of ten steps with a file.

The curve is that of :mod:`.curve`, in float32 and under autocast: in bfloat16, or in float16 where kernels are
interpreted, since Triton's interpreter has no bfloat16. The file holds it for each kind of device. The kernels are
deterministic, so all bits must be equal on the same kind of device with the same versions. With other versions or on
another kind, rounding differs, and a stated tolerance holds.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from .. import __version__
from ..host import processor
from ..io.files import read_json, replace_text
from ..kernels.launch import INTERPRET
from ..kernels.spec import CUDA
from .curve import MODEL_NAME, train
from .report import FAIL, PASS, CheckResult

FORMAT = "clipfast golden curves 1"
STEPS = 10
PRECISIONS = {"float32": None, "amp": torch.float16 if INTERPRET else torch.bfloat16}
# The largest relative difference from the curve of another kind of device, or of other versions. Runs that differ in
# nothing but rounding (another order of the pairs, PyTorch's own ops) were up to 4e-6 apart in float32, and up to 7e-2
# under autocast; the tolerances are several times that.
TOLERANCES = {"float32": 2e-5, "amp": 0.2}
Curve = dict[str, list[str]]  # "loss" and "gradient norm" of each step, as hexadecimal numbers, which keep all bits


def kind_of_device(leg: str) -> str:
    """Return the kind of device on which golden curves have the same bits: its model, and a CPU's instructions."""
    if leg == CUDA:
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} sm_{major}{minor}"
    how = "interpreted kernels on " if INTERPRET else ""
    return f"{how}{processor()} {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions on which the bits of a golden curve may depend."""
    return {"clipfast": __version__, "torch": torch.__version__, "triton": triton.__version__}


def curves(leg: str) -> dict[str, Curve]:
    """Train for the golden curve in each precision, on one thread, and return losses and gradient norms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    try:
        return {name: _curve(leg, dtype) for name, dtype in PRECISIONS.items()}
    finally:
        torch.set_num_threads(threads)


def _curve(leg: str, autocast: torch.dtype | None) -> Curve:
    """Train for the golden curve in one precision."""
    norms: list[float] = []
    losses = train("auto", "cuda" if leg == CUDA else "cpu", autocast=autocast, steps=STEPS, norms=norms)
    return {"loss": [x.hex() for x in losses.tolist()], "gradient norm": [x.hex() for x in norms]}


def verify_golden(path: Path, leg: str, *, update: bool = False) -> list[CheckResult]:
    """Compare golden curves on a leg with those in a file; without a file, or with ``update``, write them into it.

    If the file has no curve of this kind of device, a tolerance holds for the comparison with every curve in it.

    Raises:
        ValueError: the file holds no golden curves.
    """
    stored = _read(path) if path.exists() else {}
    kind, found = kind_of_device(leg), curves(leg)
    if update or not stored:
        stored[kind] = {"versions": versions(), "curves": found}
        text = {"format": FORMAT, "model": MODEL_NAME, "devices": stored}
        replace_text(path, json.dumps(text, indent=1) + "\n")
        return [CheckResult("golden", leg, "curve", kind, reason=f"written to {path}, compared with nothing")]
    others = {kind: stored[kind]} if kind in stored else stored
    return [
        row
        for name, entry in others.items()
        for precision, curve in found.items()
        for row in _compared(leg, kind, precision, curve, name, entry)
    ]


def _compared(
    leg: str, kind: str, precision: str, found: Curve, name: str, entry: Mapping[str, Any]
) -> list[CheckResult]:
    """Compare a golden curve in one precision with that of a kind of device, ``name``, and return two results."""
    changed = [f"{key} {entry['versions'].get(key)} -> {now}" for key, now in versions().items()
               if entry["versions"].get(key) != now]  # fmt: skip
    is_exact = kind == name and not changed
    rows = []
    for output, values in found.items():
        before = entry["curves"][precision][output]
        pairs = [(float.fromhex(old), float.fromhex(new)) for old, new in zip(before, values, strict=True)]
        # A NaN, which ``max`` might pass over, is infinitely far from everything.
        apart = max(math.inf if math.isnan(old + new) else abs(new - old) / abs(old) for old, new in pairs)
        first = next((step for step, (old, new) in enumerate(pairs, 1) if old != new), None)
        passed = first is None or (not is_exact and apart <= TOLERANCES[precision])
        rule = "all bits must be equal" if is_exact else f"at most {TOLERANCES[precision]:g} is allowed"
        why = "; ".join([f"compared with {name}" if kind != name else "the same kind of device", *changed])
        text = "all bits equal" if first is None else f"differs from step {first} on, by up to {apart:.2e}; {rule}"
        rows.append(
            CheckResult("golden", leg, "curve", f"{STEPS} steps of {MODEL_NAME}", precision, output,
                        PASS if passed else FAIL, f"{text}; {why}")
        )  # fmt: skip
    return rows


def _read(path: Path) -> dict[str, Any]:
    """Return the golden curves in a file, by kind of device."""
    try:
        raw = read_json(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--golden {path} cannot be read: {error}") from None
    if not _is_golden(raw):
        raise ValueError(f"--golden {path} holds no golden curves of {MODEL_NAME}: give another file, or remove it")
    devices: dict[str, Any] = raw["devices"]
    return devices


def _is_golden(raw: Any) -> bool:
    """Return whether the JSON of a file holds golden curves of each kind of device that it names."""
    try:
        curves = [entry["curves"][name] for entry in raw["devices"].values() for name in PRECISIONS]
        counts = {len([*map(float.fromhex, curve[key])]) for curve in curves for key in ("loss", "gradient norm")}
        has_versions = all(isinstance(entry["versions"], dict) for entry in raw["devices"].values())
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return raw.get("format") == FORMAT and raw.get("model") == MODEL_NAME and counts <= {STEPS} and has_versions
