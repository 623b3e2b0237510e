"""A run of the checks: ``run_verify`` does all of it, ``iter_groups`` yields the results case by case."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from ..kernels.spec import CUDA
from .child import groups_of_child
from .ops import timed
from .options import Options
from .plan import checks, here, legs_of, not_run
from .report import CheckResult, write_json, write_junit


def number_of_groups(options: Options) -> int:
    """Return the number of groups that :func:`iter_groups` yields when nothing goes wrong."""
    return sum(len(checks(options, leg)) for leg in legs_of(options))


def iter_groups(options: Options) -> Iterator[list[CheckResult]]:
    """Yield the results of one check after the other. A check that raises becomes a result that fails.

    Raises:
        ValueError: the options leave nothing to check.
    """
    legs = [leg for leg in legs_of(options) if checks(options, leg)]
    if not legs:
        raise ValueError("these options leave nothing to check: bfloat16 needs the CPU paths or a GPU, as do models")
    with contextlib.ExitStack() as stack:
        children = []
        for leg in legs:
            if leg not in (CUDA, here()):  # it runs in another process, beside the checks of this one
                of_leg = dataclasses.replace(options, legs=(leg,), device="cpu").to_dict()
                child = groups_of_child(of_leg, leg, options.hang_seconds)
                children.append(stack.enter_context(contextlib.closing(child)))
        for leg in legs:
            if leg in (CUDA, here()):
                for check in checks(options, leg):
                    yield timed(check.rows, check.template)
        for child in children:
            yield from child
    skipped = not_run(options)
    if skipped:
        yield skipped


def run_verify(
    options: Options,
    *,
    json_path: Path | None = None,
    junit_path: Path | None = None,
    on_group: Callable[[list[CheckResult]], None] | None = None,
    rows: list[CheckResult] | None = None,
) -> list[CheckResult]:
    """Run all checks and return the results. ``clipfast.verify.exit_code`` makes an exit code of them.

    The JSON file is written again after every case, so that a kill at any moment leaves the results so far; its field
    ``complete`` is true only at the end. The JUnit file is written at the end, also of an interrupted run. ``on_group``
    is called with the results of each case. They are appended to ``rows``, for a caller that handles an interruption.
    """
    rows = [] if rows is None else rows
    raw, complete = options.to_dict(), False

    def save() -> None:
        if json_path is not None:
            write_json(json_path, rows, raw, complete=complete)

    save()
    try:
        for group in iter_groups(options):
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
