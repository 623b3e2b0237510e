"""Rows of the report, and how they are written: a table for people, JSON and JUnit XML for machines."""

import dataclasses
import json
import os
import platform
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from .rule import Figure, Judgement

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
FORMAT = 1
# What XML 1.0 cannot hold, such as the colours in the stderr of a crashed process.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: an output of ``op`` in one ``case`` and dtype on one ``leg``.

    ``figures`` are empty where there is nothing to measure (repeats, what was skipped). ``truth`` is the dtype of the
    truth, ``why`` the reason that the case is in the list, ``seconds`` the share of the time.
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
        """What a row has in common with the other outputs of its case."""
        return self.op, self.leg, self.check, self.case, self.dtype

    @property
    def ratio(self) -> float:
        """The larger error as a share of what is allowed."""
        return max((figure.ratio for figure in self.figures), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; a figure that is not finite becomes a string, which JSON can hold."""
        raw = dataclasses.asdict(self)
        raw["figures"] = [{key: _finite(value) for key, value in figure.items()} for figure in raw["figures"]]
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Row":
        """Inverse of :meth:`to_dict`."""
        figures = tuple(
            Figure(figure["kind"], *(float(figure[key]) for key in ("ours", "torch", "allowed")))
            for figure in raw["figures"]
        )
        return cls(**{**raw, "figures": figures})


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value


def rows_of(template: Row, judgements: Mapping[str, Judgement]) -> list[Row]:
    """``template`` once for each judged output. What has values but no yardstick is skipped, not passed."""
    rows = []
    for name, judgement in judgements.items():
        verdict = PASS if judgement.passed else FAIL
        if judgement.no_yardstick:
            verdict = SKIP
        rows.append(
            dataclasses.replace(
                template, output=name, verdict=verdict, reason=judgement.reason, figures=judgement.figures
            )
        )
    return rows


def exit_code(rows: Sequence[Row]) -> int:
    """1 where any row failed, else 0."""
    return int(any(row.verdict == FAIL for row in rows))


def count(rows: Sequence[Row]) -> dict[str, int]:
    """Rows by verdict."""
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in (PASS, FAIL, SKIP)}


def environment() -> dict[str, str]:
    """Versions and processor that the figures belong to."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write_json(path: Path, rows: Sequence[Row], options: Mapping[str, Any], *, complete: bool) -> None:
    """Write all rows so far; the file is replaced as a whole, so that a reader or a kill never meets half of it."""
    report = {
        "format": FORMAT,
        "complete": complete,
        "environment": environment(),
        "options": dict(options),
        "summary": count(rows),
        "rows": [row.to_dict() for row in rows],
    }
    _replace(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Rows of a report, and everything else in it.

    Raises:
        ValueError: not a report of this format.
    """
    report = json.loads(path.read_text())
    if report.get("format") != FORMAT:
        raise ValueError(f"{path} is not a report of format {FORMAT}, got {report.get('format')!r}")
    return [Row.from_dict(raw) for raw in report.pop("rows")], report


def write_junit(path: Path, rows: Sequence[Row]) -> None:
    """Write JUnit XML: a testcase for each row, its class named after op and leg."""
    counts, seconds = count(rows), f"{sum(row.seconds for row in rows):.3f}"
    totals = {"tests": str(len(rows)), "failures": str(counts[FAIL]), "skipped": str(counts[SKIP]), "errors": "0"}
    root = ET.Element("testsuites", totals | {"time": seconds})
    suite = ET.SubElement(root, "testsuite", {"name": "clipfast verify"} | totals | {"time": seconds})
    properties = ET.SubElement(suite, "properties")
    for name, value in environment().items():
        ET.SubElement(properties, "property", {"name": name, "value": value})
    for row in rows:
        name = " ".join(part for part in (row.check, f"[{row.case}]", row.dtype, row.output) if part)
        attributes = {"classname": f"{row.op}.{row.leg}", "name": name, "time": f"{row.seconds:.4f}"}
        case = ET.SubElement(suite, "testcase", {key: _xml(value) for key, value in attributes.items()})
        if row.verdict == FAIL:
            ET.SubElement(case, "failure", message=_xml(row.reason)).text = _xml(f"{row.why}\n{_all_figures(row)}")
        elif row.verdict == SKIP:
            ET.SubElement(case, "skipped", message=_xml(row.reason))
        elif row.figures:
            ET.SubElement(case, "system-out").text = _xml(_all_figures(row))
    ET.indent(root)
    _replace(path, ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def _all_figures(row: Row) -> str:
    return "\n".join(
        f"{figure.kind}: ours {figure.ours:.3e}, PyTorch's {figure.torch:.3e}, allowed {figure.allowed:.3e}"
        for figure in row.figures
    )


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
