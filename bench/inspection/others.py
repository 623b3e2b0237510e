"""Compile other people's kernels for ``clipfast verify MODULE:NAME``, from the launches that it recorded."""

import dataclasses
import time
from collections.abc import Iterator

from clipfast.kernels.launch import Launch
from clipfast.verify.other_runs import Recorded
from clipfast.verify.report import FAIL, PASS, SKIP, CheckResult

from . import control_bits, offline
from .command import inspect_launch
from .model import ARCH, H100
from .report import Report


def compiled(recorded: Recorded) -> Iterator[list[CheckResult]]:
    """Compile every recorded launch, and yield a result for each kernel; then the predicted time of all on an H100."""
    reports: list[Report | None] = []
    seen: dict[str, Report | None] = {}
    for choice in recorded.choices:
        key = f"{offline.identity(choice[0])} {choice[0].grid}"
        if key not in seen:
            started = time.perf_counter()
            row, seen[key], launch = _row(recorded, choice)
            yield [dataclasses.replace(row, seconds=time.perf_counter() - started)]
            if recorded.arch == control_bits.ARCH and launch is not None:
                yield [_control_bits(row, launch)]
        reports.append(seen[key])
    if recorded.arch == ARCH and reports:
        yield [_time(recorded, reports)]


def _control_bits(compiled: CheckResult, launch: Launch) -> CheckResult:
    """Check the control bits of somebody's kernel, of which ``compiled`` is the result of its compilation."""
    started = time.perf_counter()
    cubin = offline.compile_kernel(launch, control_bits.ARCH).asm["cubin"]
    passed, reason = control_bits.check_control_bits(cubin)
    verdict = SKIP if passed is None else PASS if passed else FAIL
    seconds = time.perf_counter() - started
    return dataclasses.replace(compiled, check="control bits", verdict=verdict, reason=reason, seconds=seconds)


def _row(recorded: Recorded, choice: list[Launch]) -> tuple[CheckResult, Report | None, Launch | None]:
    """Compile somebody's kernel in one configuration after another until one has no fault.

    Return the result, the report and the launch of this configuration. If each configuration has a fault, return those
    of the best one; if none compiles, the result has the compiler's error for the first.
    """
    leg, name = f"sm_{recorded.arch}", choice[0].kernel.__name__
    template = CheckResult(recorded.name, leg, "compiled", recorded.shape, recorded.dtype, name)
    found: list[tuple[int, int, Report]] = []
    errors: list[str] = []
    for number, launch in enumerate(choice, 1):
        try:
            report = inspect_launch(launch, recorded.arch)
        except Exception as error:
            errors.append(_message(error))
            continue
        found.append((len(faults_of(report)), number, report))
        if not faults_of(report):
            break
    if not found:
        several = f"none of {len(choice)} configurations compiles" if len(choice) > 1 else "it does not compile"
        return dataclasses.replace(template, verdict=FAIL, reason=f"{several}: {errors[0]}"), None, None
    count, number, report = min(found, key=lambda one: (one[0], one[2].resources.spill_bytes))
    which = f"configuration {number} of {len(choice)}: " if len(choice) > 1 else ""
    text = which + ", ".join([*faults_of(report), *_facts(report)])
    return dataclasses.replace(template, verdict=FAIL if count else PASS, reason=text), report, choice[number - 1]


def _message(error: BaseException) -> str:
    """Return the compiler's error about somebody's kernel in one line: its cause, and its place in the source."""
    first = error
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    place = str(first).partition("\n")[0]
    text = f"{type(error).__name__}: {lines[-1] if lines else ''}"
    return f"{text} ({place})" if first is not error else text


def _facts(report: Report) -> list[str]:
    """Return the resources that somebody's compiled kernel takes, and its predicted time."""
    found = report.resources
    facts = [f"{found.registers} registers", f"{found.spill_bytes} bytes spilled"]
    facts += [f"{found.shared_bytes / 1024:.3g} KiB shared", f"products: {found.mma}"]
    facts += [f"{report.occupancy.blocks} blocks a multiprocessor"]
    if report.prediction is not None:
        facts.append(f"predicted {1e6 * report.prediction.seconds:.3g} us on an H100")
    elif report.unpredicted:
        facts.append(f"no prediction: {report.unpredicted}")
    return facts


def faults_of(report: Report) -> list[str]:
    """Return the faults of somebody's compiled kernel.

    Which matrix unit it uses is its author's choice, but products of 16 bits should use one.
    """
    missed = report.resources.mma == "none"
    return [fault for fault in report.problems if missed or not fault.startswith("multiplies with")]


def _time(recorded: Recorded, reports: list[Report | None]) -> CheckResult:
    """Return the predicted time of all launches of a call on an H100, and how many times its floor that is."""
    template = CheckResult(recorded.name, f"sm_{ARCH}", "time", recorded.shape, recorded.dtype, "all kernels")
    times = [report.prediction.seconds for report in reports if report is not None and report.prediction is not None]
    if len(times) < len(reports):
        return dataclasses.replace(template, reason=f"{len(reports) - len(times)} launches have no prediction")
    seconds, also = sum(times), ""
    if recorded.torch_flops:
        if recorded.dtype == "float32":
            return dataclasses.replace(template, reason="there is no prediction of PyTorch's products in float32")
        seconds += recorded.torch_flops / H100.power_flops
        also = f" and PyTorch's {recorded.torch_flops:.2g} FLOPs"
    text = f"predicted {1e6 * seconds:.3g} us for {len(times)} launches{also} on an H100, by the model"
    if recorded.floor is not None:
        floor = recorded.floor.seconds(H100.power_flops, H100.hbm_rate)
        text += f"; {seconds / floor:.2f} times the floor of {1e6 * floor:.3g} us"
    return dataclasses.replace(template, verdict=PASS, reason=text)
