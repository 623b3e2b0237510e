"""Test the report of ``clipfast verify``: table, summary, JSON, JUnit, exit codes, and a second process that fails."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

import clipfast
from clipfast.verify import CheckResult, Figure, Options, child, options, run_verify, summary, table
from clipfast.verify import runner as run
from clipfast.verify.report import FAIL, PASS, SKIP, read_json, write_json, write_junit

from ..small_runs import output_of, refusal_of, run_command

GOOD = Figure("max", 1e-7, 1e-7, 3e-7)
BAD = Figure("rms", 2e-7, 1e-8, float("inf"))
ATTENTION, PATCH = (
    (op, "cpu", "accuracy", case, "float32") for op, case in (("attention", "T=50"), ("patch_embed", "P=14"))
)
ROWS = [
    CheckResult(*ATTENTION, "value", PASS, figures=(GOOD,), truth="float64", seconds=0.5),
    CheckResult(*ATTENTION, "d_qkv", FAIL, "max error 1 > \x1b[31mallowed", (GOOD, BAD)),
    CheckResult("attention", "cuda", "leg", "native kernels", reason="no GPU", seconds=0.2),
    CheckResult(*PATCH, "value", PASS, figures=(GOOD,), seconds=0.1),
    CheckResult(*PATCH, "d_weight", PASS, figures=(Figure("max", 9.0, 9.0, 10.0),)),
]


@pytest.fixture
def one_leg(monkeypatch, small_cases):
    """Let the verification run only the CPU path, at small cases."""
    monkeypatch.setattr(run, "legs_of", lambda options: ("cpu",))


def test_json_round_trip(tmp_path):
    path = tmp_path / "v.json"
    write_json(path, ROWS, Options(ops=("attention",)).to_dict(), complete=True)
    rows, rest = read_json(path)
    assert rows == ROWS
    assert Options.from_dict(rest["options"]) == Options(ops=("attention",))
    assert rest["summary"] == {PASS: 3, FAIL: 1, SKIP: 1}
    assert rest["complete"] is True
    assert "torch" in rest["environment"]
    assert list(tmp_path.iterdir()) == [path]
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1, got 99"):
        read_json(path)


def test_junit_counts_and_figures(tmp_path):
    path = tmp_path / "v.xml"
    write_junit(path, ROWS)
    root = ET.parse(path).getroot()
    assert [root.get(key) for key in ("tests", "failures", "skipped", "time")] == ["5", "1", "1", "0.600"]
    suite, gpu = root.findall("testsuite")
    assert [suite.get(key) for key in ("tests", "failures", "skipped", "time")] == ["4", "1", "0", "0.600"]
    assert [gpu.get(key) for key in ("tests", "failures", "skipped", "time")] == ["1", "0", "1", "0.200"]
    about = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert about["clipfast"] == clipfast.__version__
    assert about.keys() >= {"commit", "torch", "triton"}
    cases = suite.findall("testcase")
    assert len(cases) == 4
    assert cases[0].get("classname") == "attention.cpu"
    assert float(cases[0].get("time")) == 0.5
    (failure,) = suite.iter("failure")
    assert "max error 1 > ?[31mallowed" in failure.get("message")
    assert "max: ours 1.000e-07, PyTorch's 1.000e-07, allowed 3.000e-07" in failure.text
    assert len(list(gpu.iter("skipped"))) == 1


def test_table_and_summary_name_every_failure_and_what_was_not_run():
    text, lines = table(ROWS), summary(ROWS, 12.0).splitlines()
    assert "d_weight (nearest of 2)" in text
    assert text.count("FAIL ") == 1
    assert len(table(ROWS, all_rows=True).splitlines()) > len(text.splitlines())
    assert re.match("FAILED .*attention cpu d_qkv.*T=50: max error 1", lines[0])
    assert re.match("NOT RUN .*no GPU", lines[1])


def test_command_writes_everything(capsys, tmp_path, one_leg):
    files = ("--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml")
    out, _ = output_of(capsys, "verify", "--op", "attention", *files, "--dtype", "fp32")
    rows, rest = read_json(tmp_path / "v.json")
    assert rest["complete"]
    assert ET.parse(tmp_path / "v.xml").getroot().get("tests") == str(len(rows))
    assert f"{len(rows) - 1} passed, 0 failed, 1 skipped" in out.splitlines()[-1]


def test_command_fails_where_a_row_does(capsys, one_leg, monkeypatch):
    monkeypatch.setattr(run, "timed", lambda rows, template: [ROWS[1]])
    code, out, _ = run_command(capsys, "verify", "--op", "attention", "--dtype", "fp32")
    assert code == 1
    assert "FAILED   attention cpu d_qkv" in out


def test_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(options, "installed", lambda peer: False)
    err = refusal_of(capsys, "verify", "--against", "openclip")
    assert "--against openclip: not installed; pip install open-clip-torch" in err


def test_interruption_prints_what_is_there(capsys, tmp_path, one_leg, monkeypatch):
    right, calls = run.timed, []

    def interrupted(rows, template):
        """Run a check, or interrupt the verification at its third check."""
        calls.append(template)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(rows, template)

    monkeypatch.setattr(run, "timed", interrupted)
    files = ("--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml")
    code, out, _ = run_command(capsys, "verify", "--op", "attention", *files)
    assert code == 130
    assert "INTERRUPTED" in out.splitlines()[-1]
    rows, rest = read_json(tmp_path / "v.json")
    assert rows
    assert not rest["complete"]
    assert ET.parse(tmp_path / "v.xml").getroot().get("tests") == str(len(rows))


def test_rows_are_on_disk_after_every_case(tmp_path, one_leg):
    path, seen = tmp_path / "v.json", []

    def look(group):
        """Check that the rows of the verification so far are in its report on the disk."""
        before, rest = read_json(path)
        assert not rest["complete"]
        assert len(before) == len(seen)
        seen.extend(group)

    assert run_verify(Options(ops=("attention",)), json_path=path, on_group=look) == seen
    assert len(seen) > 6


DEATH = f"import os; print({json.dumps([ROWS[0].to_dict()])!r}, flush=True); os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("program", "hang_seconds", "kept", "reason"),
    [
        (child.PROGRAM, 120.0, [], r"ended early with exit code 1(?s:.*)\n.*unknown 'softmax'.*$"),
        ("pass", 120.0, [], "ended early with exit code 0, before its first check"),
        (DEATH, 120.0, ROWS[:1], "exit code -9, after attention cpu accuracy T=50 float32"),
        ("import time; time.sleep(60)", 1.0, [], "hung: silent for 1 s"),
    ],
    ids=["crash", "silent end", "death", "hang"],
)
def test_a_process_that_fails_is_a_row_and_keeps_those_before(monkeypatch, program, hang_seconds, kept, reason):
    monkeypatch.setattr(child, "PROGRAM", program)
    raw = Options(ops=("attention",)).to_dict() | {"ops": ["softmax"]}
    *before, (row,) = child.groups_of_child(raw, "interpreter", hang_seconds)
    assert before == [[found] for found in kept]
    assert (row.op, row.leg, row.verdict) == ("legs", "interpreter", FAIL)
    assert re.search(reason, row.reason)


def test_interpreter_leg_comes_back_from_its_process():
    rows = run_verify(Options(ops=("bias_gelu",), dtypes=("fp32",), legs=("interpreter",), quick=True))
    assert len(rows) > 5
    assert {(row.op, row.leg) for row in rows} == {("bias_gelu", "interpreter")}


def test_the_interpreter_leg_passes_with_any_kernels_of_openblas(monkeypatch):
    # On a CPU with AVX2, Haswell's kernels round a logit by where it stands in the product.
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    rows = run_verify(Options(ops=("nt_xent_loss",), dtypes=("fp32",), legs=("interpreter",)))
    assert {row.verdict for row in rows} == {PASS}
