"""The plan of a verification: it says which checks run on which leg, and which cannot run on this machine."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from ..kernels.launch import INTERPRET
from ..kernels.spec import ACCURACY, CPU, CUDA, INTERPRETER, specs
from .curve import MODEL_NAME, verify_curve
from .models import verify_model
from .ops import planned, verify_case
from .options import CURVE, MODEL, OPENCLIP, PEERS, Options, installed
from .report import CheckResult

NO_GPU = "no CUDA GPU here: the native kernels were not run"
BF16_INTERPRETED = "Triton's interpreter multiplies bfloat16 as raw bits: only a GPU can run the kernels in it"


@dataclasses.dataclass(frozen=True)
class Check:
    """A check: ``rows`` runs it and returns its result rows; ``template`` is filled in as its row if that raises."""

    template: CheckResult
    rows: Callable[[], list[CheckResult]]


def here() -> str:
    """Return the leg that CPU tensors run on in this process; Triton chose it when it was imported."""
    return INTERPRETER if INTERPRET else CPU


def legs_of(options: Options) -> tuple[str, ...]:
    """Return the legs to run, in order."""
    by_device = (CUDA,) if options.on_gpu else (CPU, INTERPRETER)
    return by_device if options.legs is None else options.legs


def checks(options: Options, leg: str) -> list[Check]:
    """Return everything that runs on ``leg``; the interpreter is too slow for models and training."""
    dtypes = [name for name in options.dtypes if not (leg == INTERPRETER and name == "bfloat16")]
    found: list[Check] = []
    for op in options.ops:
        if op not in (MODEL, CURVE):
            for case, dtype in planned(op, leg, dtypes, quick=options.quick):
                template = CheckResult(op, leg, case.check, case.name, dtype, why=case.why)
                check = partial(verify_case, specs()[op], leg, case, dtype, quick=options.quick)
                found.append(Check(template, check))
        elif leg != INTERPRETER:
            found += (_model_checks if op == MODEL else _curve_checks)(options, leg, dtypes)
    return found


def _model_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    """Return the checks of whole models, against their reference and against other implementations."""
    peers = options.against or ((OPENCLIP,) if installed(OPENCLIP) else ())
    check = partial(verify_model, quick=options.quick)
    return [
        Check(CheckResult(peer, leg, ACCURACY, name, dtype), partial(check, peer, name, leg, dtype))
        for peer in (MODEL, *peers)
        for name in options.models
        for dtype in dtypes[: 1 if options.quick else None]
    ]


def _curve_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    """Return the training checks: in float32, and under bfloat16 autocast on a GPU.

    On a CPU, bfloat16 takes minutes and runs only if it is the only dtype that is asked for.
    """
    wanted = [] if options.quick and leg == CPU else [name for name in dtypes if name != "float16"]
    if leg == CPU and "float32" in wanted:
        wanted = ["float32"]
    return [
        Check(CheckResult(CURVE, leg, "training", MODEL_NAME, dtype), partial(verify_curve, leg, dtype))
        for dtype in wanted
    ]


def not_run(options: Options) -> list[CheckResult]:
    """Return what cannot be run here, as rows that are skipped."""
    legs = legs_of(options)
    rows: list[CheckResult] = []
    if options.legs is None and CUDA in legs:
        for leg, what in ((CPU, "PyTorch paths"), (INTERPRETER, "interpreted kernels")):
            rows.append(CheckResult("legs", leg, "leg", what, reason="runs with --device cpu"))
    elif options.legs is None:
        reason = "--device cpu: the native kernels were not run" if torch.cuda.is_available() else NO_GPU
        rows.append(CheckResult("legs", CUDA, "leg", "native kernels", reason=reason))
    if INTERPRETER in legs and "bfloat16" in options.dtypes:
        rows.append(CheckResult("legs", INTERPRETER, "leg", "kernels", "bfloat16", reason=BF16_INTERPRETED))
    if MODEL in options.ops and options.against is None and not installed(OPENCLIP):
        reason = f"OpenCLIP is not installed: pip install {PEERS[OPENCLIP][1]}"
        rows.append(CheckResult(OPENCLIP, legs[0], ACCURACY, ", ".join(options.models), reason=reason))
    if options.quick and CURVE in options.ops and CPU in legs:
        rows.append(CheckResult(CURVE, CPU, "training", MODEL_NAME, "float32", reason="left out by --quick"))
    return rows
