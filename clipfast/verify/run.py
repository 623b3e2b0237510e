"""A run of the checks. ``run_verify`` is the whole of it; ``iter_groups`` streams the rows, case by case."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from ..kernels.spec import CUDA
from .child import groups_of_child
from .ops import timed
from .options import Options
from .plan import checks, here, legs_of, not_run
from .report import Row, write_json, write_junit


def number_of_groups(options: Options) -> int:
    """How many groups :func:`iter_groups` gives when all goes well."""
    return sum(len(checks(options, leg)) for leg in legs_of(options))


def iter_groups(options: Options) -> Iterator[list[Row]]:
    """The rows of one check after the other. A check that raises is a row that fails; nothing is raised for it.

    Raises:
        ValueError: options that leave nothing to check.
    """
    if number_of_groups(options) == 0:
        raise ValueError("these options leave nothing to check: bfloat16 needs the CPU paths or a GPU, as do models")
    for leg in legs_of(options):
        if leg in (CUDA, here()):
            for check in checks(options, leg):
                yield timed(check.rows, check.template)
        elif checks(options, leg):
            child = dataclasses.replace(options, legs=(leg,), device="cpu")
            yield from groups_of_child(child.to_dict(), leg, options.hang_seconds)
    skipped = not_run(options)
    if skipped:
        yield skipped


def run_verify(
    options: Options,
    *,
    json_path: Path | None = None,
    junit_path: Path | None = None,
    on_group: Callable[[list[Row]], None] | None = None,
    rows: list[Row] | None = None,
) -> list[Row]:
    """Run all checks.

    Args:
        options: what to verify.
        json_path: rewritten after every case, so that a kill at any moment leaves the rows so far; ``complete`` in it
            is true at the end only.
        junit_path: written at the end, also of an interrupted run.
        on_group: called with the rows of each case.
        rows: appended to as they come, for a caller that survives an interruption.

    Returns:
        All rows; ``clipfast.verify.exit_code`` says what they come to.
    """
    rows = [] if rows is None else rows
    raw, complete = options.to_dict(), False
    if json_path is not None:
        write_json(json_path, rows, raw, complete=False)
    try:
        for group in iter_groups(options):
            rows += group
            if on_group is not None:
                on_group(group)
            if json_path is not None:
                write_json(json_path, rows, raw, complete=False)
        complete = True
    finally:
        if json_path is not None:
            write_json(json_path, rows, raw, complete=complete)
        if junit_path is not None:
            write_junit(junit_path, rows)
    return rows
