"""Run a verification: choose the checks of each leg, report those that cannot run here, and collect the results."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from ..io.files import local_path
from ..kernels.launch import INTERPRET
from ..kernels.spec import ACCURACY, CPU, CUDA, INTERPRETER, specs
from .child import children
from .context import speed_up_interpreter
from .curve import MODEL_NAME, verify_curve
from .golden import verify_golden
from .models import verify_model
from .ops import Check, planned, timed, verify_case
from .options import CURVE, MODEL, OPENCLIP, PEERS, Options, installed
from .other_runs import Compiled, checks_of_other, groups_of_other
from .others import load
from .report import CheckResult, write_json, write_junit

NO_GPU = "no CUDA GPU here: the native kernels were not run"
BF16_INTERPRETED = "Triton's interpreter multiplies bfloat16 as raw bits: only a GPU can run the kernels in it"


def here() -> str:
    """Return the leg that this process can run on CPU tensors: "interpreter" if Triton interprets kernels, or "cpu"."""
    return INTERPRETER if INTERPRET else CPU


def legs_of(options: Options) -> tuple[str, ...]:
    """Return the legs ("cpu", "interpreter", "cuda") that a verification with these options runs, in order."""
    by_device = (CUDA,) if options.on_gpu else (CPU, INTERPRETER)
    return by_device if options.legs is None else options.legs


def checks(options: Options, leg: str) -> list[Check]:
    """Return all checks of the verification on ``leg``; on "interpreter", only those of ops, since models take long.

    With ``options.others``, they are the checks of other people's kernels.
    """
    dtypes = [name for name in options.dtypes if not (leg == INTERPRETER and name == "bfloat16")]
    if leg == INTERPRETER:
        speed_up_interpreter()
    if options.others:
        return [check for text in options.others for check in checks_of_other(load(text), leg, options)]
    found: list[Check] = []
    for op in options.ops:
        if op not in (MODEL, CURVE):
            for case, dtype in planned(specs()[op], leg, dtypes, quick=options.quick):
                template = CheckResult(op, leg, case.check, case.name, dtype, why=case.why)
                check = partial(verify_case, specs()[op], leg, case, dtype, quick=options.quick)
                found.append(Check(template, check))
        elif leg != INTERPRETER:
            found += (_model_checks if op == MODEL else _curve_checks)(options, leg, dtypes)
    return found


def _model_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    """Return the verification's checks of whole models, against PyTorch's ops, OpenCLIP and Hugging Face."""
    peers = options.against or ((OPENCLIP,) if installed(OPENCLIP) else ())
    check = partial(verify_model, quick=options.quick)
    return [
        Check(CheckResult(peer, leg, ACCURACY, name, dtype), partial(check, peer, name, leg, dtype))
        for peer in (MODEL, *peers)
        for name in options.models
        for dtype in dtypes[: 1 if options.quick else None]
    ]


def _curve_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    """Return the verification's training checks: in float32, and under bfloat16 autocast on a GPU.

    On a CPU, bfloat16 takes minutes, so it runs only if it is the only requested dtype.
    """
    wanted = [] if options.quick and leg == CPU else [name for name in dtypes if name != "float16"]
    if leg == CPU and "float32" in wanted:
        wanted = ["float32"]
    return [
        Check(CheckResult(CURVE, leg, "training", MODEL_NAME, dtype), partial(verify_curve, leg, dtype))
        for dtype in wanted
    ]


def not_run(options: Options) -> list[CheckResult]:
    """Return a skipped result for each kind of check that the verification cannot run here or leaves out, and why."""
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


def iter_groups(
    options: Options, *, on_total: Callable[[int], None] | None = None, compiled: Compiled | None = None
) -> Iterator[list[CheckResult]]:
    """Run the checks of the verification, and yield the results of each; one that raises becomes a failed result.

    ``on_total`` is called with the number of checks before the first one runs, unless they are of other people's
    kernels. ``compiled`` compiles the launches of other people's kernels, and yields the results.

    Raises:
        ValueError: the options leave nothing to check.
    """
    if options.golden:
        leg = CUDA if options.on_gpu else here()
        yield verify_golden(local_path(options.golden), leg, update=options.update)
        return
    if options.others:
        for text in options.others:
            yield from groups_of_other(text, options, compiled)
        return
    by_leg = {leg: found for leg in legs_of(options) if (found := checks(options, leg))}
    if not by_leg:
        raise ValueError("these options leave nothing to check: bfloat16 needs the CPU paths or a GPU, as do models")
    if on_total is not None:
        on_total(sum(map(len, by_leg.values())))
    own = {leg: found for leg, found in by_leg.items() if leg in (CUDA, here())}
    # Each of the other legs runs in a process of its own, in parallel to the checks of this process.
    with children(options, [leg for leg in by_leg if leg not in own]) as others:
        for check in itertools.chain(*own.values()):
            yield timed(check.rows, check.template)
        yield from itertools.chain(*others)
    skipped = not_run(options)
    if skipped:
        yield skipped


def run_verify(
    options: Options,
    *,
    json_path: Path | None = None,
    junit_path: Path | None = None,
    on_group: Callable[[list[CheckResult]], None] | None = None,
    on_total: Callable[[int], None] | None = None,
    compiled: Compiled | None = None,
    rows: list[CheckResult] | None = None,
) -> list[CheckResult]:
    """Run all checks and return the results. ``clipfast.verify.exit_code`` makes an exit code of them.

    The JSON file is written after every case, so a run that is killed leaves the results so far; its field ``complete``
    is true only at the end. The JUnit file is written at the end, even if the run is interrupted. ``on_group`` is
    called with the results of each case, and ``on_total`` and ``compiled`` as by :func:`iter_groups`. The results are
    appended to ``rows``, for a caller that handles an interruption.
    """
    rows = [] if rows is None else rows
    raw, complete = options.to_dict(), False

    def save() -> None:
        """Write the results of the verification so far as JSON, if a path is given."""
        if json_path is not None:
            write_json(json_path, rows, raw, complete=complete)

    save()
    try:
        for group in iter_groups(options, on_total=on_total, compiled=compiled):
            rows += group
            if on_group is not None:
                on_group(group)
            save()
        complete = True
    finally:
        save()
        if junit_path is not None:
            write_junit(junit_path, rows)
    return rows
