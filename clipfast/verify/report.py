"""The results of a verification, and their output as tables with a summary, as JSON and as JUnit XML."""

import dataclasses
import json
import platform
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import triton

from .. import __version__
from ..host import commit
from ..io.files import replace_text
from ..io.page import section, write_page
from ..io.page import table as table_of_page
from ..io.text import align
from .rule import KINDS, Figure, Judgement

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
FORMAT = 1
HEADER = (
    "", "leg", "dtype", "check", "case", "output",
    "max: ours", "PyTorch", "allowed", "rms: ours", "PyTorch", "allowed", "",
)  # fmt: skip
REASON_WIDTH = 100
# Characters that XML 1.0 cannot hold, such as the colour codes in the stderr of a crashed process.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of one check, a row of the report: one output of ``op`` in one ``case`` and dtype on one ``leg``.

    ``figures`` has the measured errors; it is empty for repeated calls and skipped checks. ``truth`` is the dtype of
    the exact result, ``why`` the reason why the case is checked, and ``seconds`` the share of this output in the time
    of the case.
    """

    op: str
    leg: str
    check: str
    case: str
    dtype: str = ""
    output: str = ""
    verdict: str = SKIP
    reason: str = ""
    figures: tuple[Figure, ...] = ()
    truth: str = ""
    why: str = ""
    seconds: float = 0.0

    @property
    def group(self) -> tuple[str, ...]:
        """Return op, leg, check, case and dtype, which are the same for the results of all outputs of a case."""
        return self.op, self.leg, self.check, self.case, self.dtype

    @property
    def ratio(self) -> float:
        """Return the largest ratio of a measured error to the error that the rule allows; 0 without errors."""
        return max((figure.ratio for figure in self.figures), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a verification result for JSON, in which errors that are not finite become strings."""
        raw = dataclasses.asdict(self)
        raw["figures"] = [{key: _finite(value) for key, value in figure.items()} for figure in raw["figures"]]
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CheckResult":
        """Restore the result of a verification check from :meth:`to_dict`."""
        figures = tuple(
            Figure(figure["kind"], *(float(figure[key]) for key in ("ours", "torch", "allowed")))
            for figure in raw["figures"]
        )
        return cls(**{**raw, "figures": figures})


def _finite(value: Any) -> Any:
    """Return a value for the JSON report of the verification; infinity and NaN become text, which JSON can hold."""
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value


def results_of(template: CheckResult, judgements: Mapping[str, Judgement]) -> list[CheckResult]:
    """Return the verification result of each output that the rule has judged, with the other fields of ``template``.

    An output is skipped if PyTorch's own result gives no error to compare with.
    """
    rows = []
    for name, judgement in judgements.items():
        verdict = SKIP if judgement.no_yardstick else PASS if judgement.passed else FAIL
        row = dataclasses.replace(template, output=name, verdict=verdict, reason=judgement.reason)
        rows.append(dataclasses.replace(row, figures=judgement.figures))
    return rows


def exit_code(rows: Sequence[CheckResult]) -> int:
    """Return the exit code of ``clipfast verify``: 1 if any check failed, else 0."""
    return int(any(row.verdict == FAIL for row in rows))


def count(rows: Sequence[CheckResult]) -> dict[str, int]:
    """Return the number of verification results for each verdict."""
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, FAIL, SKIP)}


def environment() -> dict[str, str]:
    """Return the versions and the hardware on which the verification ran."""
    found = {"clipfast": __version__, "commit": commit()["sha"] or "unknown", "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    found |= {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(path: Path, rows: Sequence[CheckResult], options: Mapping[str, Any], *, complete: bool) -> None:
    """Write a JSON report of all results of the verification so far to ``path``, replacing an earlier one."""
    report = {
        "format": FORMAT, "complete": complete, "environment": environment(), "options": dict(options),
        "summary": count(rows), "rows": [row.to_dict() for row in rows],
    }  # fmt: skip
    replace_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> tuple[list[CheckResult], dict[str, Any]]:
    """Return the results in a JSON report of the verification, and the report's other entries.

    Raises:
        ValueError: the file is no report of this format.
    """
    report = json.loads(path.read_text())
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} is not a report of format {FORMAT}, got {report.get('format')!r}")
    return [CheckResult.from_dict(raw) for raw in report.pop("rows")], report


def write_junit(path: Path, rows: Sequence[CheckResult]) -> None:
    """Replace ``path`` by JUnit XML: a suite for each leg with a testcase for each result, named after its op.

    The legs run at the same time in processes of their own, so the time of all suites is that of the longest leg.
    """
    legs = {leg: [row for row in rows if row.leg == leg] for leg in dict.fromkeys(row.leg for row in rows)}
    totals = {leg: _totals(found) for leg, found in legs.items()}
    longest = max((float(total["time"]) for total in totals.values()), default=0.0)
    root = ET.Element("testsuites", _totals(rows) | {"time": f"{longest:.3f}"})
    where = environment()
    for leg, found in legs.items():
        suite = ET.SubElement(root, "testsuite", {"name": f"clipfast verify: {leg}"} | totals[leg])
        properties = ET.SubElement(suite, "properties")
        for name, value in where.items():
            ET.SubElement(properties, "property", {"name": name, "value": value})
        for row in found:
            _add_testcase(suite, row)
    ET.indent(root)
    replace_text(path, ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _totals(rows: Sequence[CheckResult]) -> dict[str, str]:
    """Return the attributes of a JUnit suite of verification results."""
    counts, seconds = count(rows), sum(row.seconds for row in rows)
    numbers = {"tests": len(rows), "failures": counts[FAIL], "skipped": counts[SKIP], "errors": 0}
    return {name: str(number) for name, number in numbers.items()} | {"time": f"{seconds:.3f}"}


def _add_testcase(suite: ET.Element, row: CheckResult) -> None:
    """Add a verification result to its JUnit suite."""
    name = " ".join(part for part in (row.check, f"[{row.case}]", row.dtype, row.output) if part)
    attributes = {"classname": f"{row.op}.{row.leg}", "name": name, "time": f"{row.seconds:.4f}"}
    case = ET.SubElement(suite, "testcase", {key: _xml(value) for key, value in attributes.items()})
    if row.verdict == FAIL:
        ET.SubElement(case, "failure", message=_xml(row.reason)).text = _xml(f"{row.why}\n{_all_figures(row)}")
    elif row.verdict == SKIP:
        ET.SubElement(case, "skipped", message=_xml(row.reason))
    elif row.figures:
        ET.SubElement(case, "system-out").text = _xml(_all_figures(row))


def write_html(path: Path, rows: Sequence[CheckResult]) -> None:
    """Write a page of all results of the verification, those that failed first, to ``path``."""
    counts, order = count(rows), (FAIL, PASS, SKIP)
    names = ", ".join(dict.fromkeys(row.op for row in rows))
    where = ", ".join(f"{name} {value}" for name, value in environment().items())
    words = f"{len(rows)} checks: {counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} were not run. {where}."
    cells = [
        (row.verdict, *row.group, row.output, row.reason or _all_figures(row), row.why)
        for row in sorted(rows, key=lambda row: order.index(row.verdict))
    ]
    heads = ("", "kernel", "leg", "check", "case", "dtype", "output", "result", "why it is checked")
    title = f"clipfast verify: {names}"
    write_page(path, title, section(title, words, level=1) + table_of_page(cells, heads))


def _xml(text: str) -> str:
    """Replace characters of the verification's report that XML cannot hold."""
    return _NOT_XML.sub("?", text)


def _all_figures(row: CheckResult) -> str:
    """Return the measured and allowed errors of a verification result as text, a line for each kind of error."""
    return "\n".join(
        f"{figure.kind}: ours {figure.ours:.3e}, PyTorch's {figure.torch:.3e}, allowed {figure.allowed:.3e}"
        for figure in row.figures
    )


def table(rows: Sequence[CheckResult], *, all_rows: bool = False) -> str:
    """Return a table of the verification's results for each op.

    With ``all_rows`` it has a row for every output. Otherwise a case that passes has one row, for the output whose
    error is nearest to its limit.
    """
    by_op: dict[str, list[CheckResult]] = defaultdict(list)
    for row in rows:
        by_op[row.op].append(row)
    blocks = []
    for op, group in by_op.items():
        shown = [(row, 1) for row in group] if all_rows else _nearest(group)
        blocks.append(f"{op}\n" + align([HEADER, *(_cells(row, outputs) for row, outputs in shown)], indent="  "))
    return "\n\n".join(blocks)


def _nearest(rows: Iterable[CheckResult]) -> list[tuple[CheckResult, int]]:
    """Return the rows of the verification's short table, each with the number of outputs that it represents.

    Each result that did not pass has a row, and each case has one row for its outputs that passed.
    """
    shown: list[tuple[CheckResult, int]] = []
    for _, group in groupby(rows, key=lambda row: row.group):
        members = list(group)
        passed = [row for row in members if row.verdict == PASS]
        shown += [(row, 1) for row in members if row.verdict != PASS]
        if passed:
            shown.append((max(passed, key=lambda row: row.ratio), len(passed)))
    return shown


def _cells(row: CheckResult, outputs: int) -> tuple[str, ...]:
    """Return the cells of a verification result in the table, in which it stands for ``outputs`` outputs."""
    figures = {figure.kind: figure for figure in row.figures}
    numbers = [
        f"{getattr(figures[kind], name):.1e}" if kind in figures else ""
        for kind in KINDS
        for name in ("ours", "torch", "allowed")
    ]
    output = row.output if outputs == 1 else f"{row.output} (nearest of {outputs})"
    note = row.reason.splitlines()[0][:REASON_WIDTH] if row.reason and not (row.figures and row.verdict == FAIL) else ""
    if row.truth and row.truth != "float64":
        note = f"truth in {row.truth}; {note}".removesuffix("; ")
    return row.verdict, row.leg, row.dtype, row.check, row.case, output, *numbers, note


def summary(rows: Sequence[CheckResult], seconds: float, *, complete: bool = True) -> str:
    """Return a line for each output that failed the verification, one for each check not run, and a line of counts."""
    lines = []
    for (op, leg, output), failed in _collect(rows, FAIL).items():
        worst = max(failed, key=lambda row: row.ratio)
        number = sum((row.op, row.leg, row.output) == (op, leg, output) for row in rows)
        dtypes = ", ".join(dict.fromkeys(row.dtype for row in failed if row.dtype))
        lines.append(
            f"FAILED   {' '.join(part for part in (op, leg, output) if part)}: {len(failed)} of {number} checks "
            f"({dtypes}); worst: {worst.case}: {''.join(worst.reason.strip().splitlines()[-1:])}"
        )
    for (op, leg, output), skipped in _collect(rows, SKIP).items():
        what = " ".join(part for part in (op, leg, output, skipped[0].dtype) if part)
        lines.append(f"NOT RUN  {what}: {skipped[0].reason}" + (f" ({len(skipped)} rows)" if len(skipped) > 1 else ""))
    counts = count(rows)
    ending = "" if complete else "; INTERRUPTED, the rest was not run"
    totals = f"{len(rows)} checks: {counts[PASS]} passed, {counts[FAIL]} failed, {counts[SKIP]} skipped"
    return "\n".join([*lines, f"{totals} in {seconds:.0f} s{ending}"])


def _collect(rows: Sequence[CheckResult], verdict: str) -> dict[tuple[str, str, str], list[CheckResult]]:
    """Collect the verification results with this verdict by op, leg and output."""
    found: dict[tuple[str, str, str], list[CheckResult]] = defaultdict(list)
    for row in rows:
        if row.verdict == verdict:
            found[row.op, row.leg, row.output if verdict == FAIL else row.case].append(row)
    return found
