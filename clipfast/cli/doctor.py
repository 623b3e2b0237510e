"""Check this machine for clipfast: its packages, GPUs, processors, memory and folders; print problems and their fixes.

Each line is ok, a note (worth knowing), or a problem (clipfast does not work, or not as it should), with its fix in the
next line. The group "a run with default options" checks the default model and batch, so its problems may not be those
of your run. Nothing is written, except that with --data the index of a few shards is kept.
"""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from ..doctor.machine import NOTE, PROBLEM, Finding, looked, looks
from ..io.files import replace_text
from ..io.text import align
from ..train.option_checks import SOURCE_OPTIONS
from .arguments import add_output
from .options import add_arguments

EPILOG = """\
examples:
  clipfast doctor
  clipfast doctor --data 'data/{00000..01243}.tar' --logs /scratch/runs
  clipfast doctor --data photos --all --list bad.tsv
  clipfast doctor --json doctor.json

exit code: 0 no problem, 1 there is one, 2 bad arguments"""


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast doctor``."""
    parser = commands.add_parser("doctor", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--data", metavar="SHARDS", help="also look at these shards, named as for --train-data of clipfast train")
    add("--all", action="store_true", help="read and decode every pair of --data, on all cores, and count the bad ones")
    add_output(parser, "--list", help="with --all: write the bad pairs to FILE: name, kind and reason")
    add_arguments(parser, SOURCE_OPTIONS)
    logs = "folder of the runs, as clipfast train takes it (default: runs)"
    add("--logs", "--folder", dest="folder", type=Path, default=Path("runs"), metavar="DIR", help=logs)
    add_output(parser, "--json", help="also write everything to FILE")
    parser.runs(run)


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast doctor``: print what is found, group by group, and return the exit code."""
    if (args.all and args.data is None) or (args.list is not None and not args.all):
        raise ValueError("--all needs --data, and --list needs --all")
    found: dict[str, list[Finding]] = {}
    groups = looks(args.folder)
    if args.data is not None:
        from ..doctor.dataset import dataset

        groups["data"] = functools.partial(dataset, args.data, vars(args))
    for group, look in groups.items():
        found[group] = looked(look, traceback=args.traceback)
        print(f"{group}\n{_table(found[group])}\n", flush=True)
    statuses = [finding.status for findings in found.values() for finding in findings]
    problems, notes = (statuses.count(status) for status in (PROBLEM, NOTE))
    print(f"{problems} problem(s), {notes} note(s)")
    if args.json is not None:
        written = {group: [dataclasses.asdict(finding) for finding in findings] for group, findings in found.items()}
        replace_text(args.json, json.dumps({"problems": problems, "notes": notes, "groups": written}, indent=1) + "\n")
    return int(problems > 0)


def _table(findings: list[Finding]) -> str:
    """Return the findings of one check of ``clipfast doctor`` as a text table, each fix below its finding."""
    rows = []
    for finding in findings:
        rows.append((finding.status, finding.name, finding.value))
        if finding.fix:
            rows.append(("", "", f"-> {finding.fix}"))
    return align(rows, indent="  ")
