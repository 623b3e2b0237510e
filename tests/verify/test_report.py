"""The report: table, summary, JSON, JUnit, exit codes, and a second process that fails."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from clipfast.kernels.spec import LEGS, specs
from clipfast.verify import CheckResult, Figure, Options, child, options, plan, run, run_verify, summary, table
from clipfast.verify.report import FAIL, PASS, SKIP, read_json, write_json, write_junit

from ..clip.conftest import run_command

GOOD = Figure("max", 1e-7, 1e-7, 3e-7)
BAD = Figure("rms", 2e-7, 1e-8, float("inf"))
ATTENTION, PATCH = (
    (op, "cpu", "accuracy", case, "float32") for op, case in (("attention", "T=50"), ("patch_embed", "P=14"))
)
ROWS = [
    CheckResult(*ATTENTION, "value", PASS, figures=(GOOD,), truth="float64", seconds=0.5),
    CheckResult(*ATTENTION, "d_qkv", FAIL, "max error 1 > \x1b[31mallowed", (GOOD, BAD)),
    CheckResult("attention", "cuda", "leg", "native kernels", reason="no GPU"),
    CheckResult(*PATCH, "value", PASS, figures=(GOOD,)),
    CheckResult(*PATCH, "d_weight", PASS, figures=(Figure("max", 9.0, 9.0, 10.0),)),
]


@pytest.fixture
def one_leg(monkeypatch, small_cases):
    """Only the CPU path, at small cases."""
    for module in (plan, run):
        monkeypatch.setattr(module, "legs_of", lambda options: ("cpu",))


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
    suite = ET.parse(path).getroot().find("testsuite")
    assert [suite.get(key) for key in ("tests", "failures", "skipped")] == ["5", "1", "1"]
    cases = suite.findall("testcase")
    assert len(cases) == 5
    assert cases[0].get("classname") == "attention.cpu"
    assert float(cases[0].get("time")) == 0.5
    (failure,) = suite.iter("failure")
    assert "max error 1 > ?[31mallowed" in failure.get("message")
    assert "max: ours 1.000e-07, PyTorch's 1.000e-07, allowed 3.000e-07" in failure.text
    assert len(list(suite.iter("skipped"))) == 1


def test_table_shows_the_nearest_and_every_failure():
    text = table(ROWS)
    assert text.index("attention\n") < text.index("patch_embed\n")
    assert "d_weight (nearest of 2)" in text
    assert sum(line.lstrip().startswith("FAIL") for line in text.splitlines()) == 1
    everything = [line for line in table(ROWS, all_rows=True).splitlines() if line.lstrip()[:4] in (PASS, FAIL, SKIP)]
    assert len(everything) == len(ROWS)


def test_summary_names_failures_and_what_was_not_run():
    lines = summary(ROWS, 12.0).splitlines()
    assert lines[0].startswith("FAILED   attention cpu d_qkv: 1 of 1 checks (float32); worst: T=50: max error 1")
    assert lines[1] == "NOT RUN  attention cuda native kernels: no GPU"
    assert lines[-1] == "5 checks: 3 passed, 1 failed, 1 skipped in 12 s"


def test_command_writes_everything(capsys, tmp_path, one_leg):
    files = ("--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml")
    code, out, _ = run_command(capsys, "verify", "--op", "attention", *files, "--dtype", "fp32")
    assert code == 0
    rows, rest = read_json(tmp_path / "v.json")
    assert rest["complete"]
    assert ET.parse(tmp_path / "v.xml").getroot().get("tests") == str(len(rows))
    assert "attention\n" in out
    assert f"{len(rows)} checks: {len(rows) - 1} passed, 0 failed, 1 skipped" in out.splitlines()[-1]
    assert "NOT RUN  legs cuda native kernels: no CUDA GPU here" in out


def test_command_fails_where_a_row_does(capsys, one_leg, monkeypatch):
    right = run.timed
    monkeypatch.setattr(run, "timed", lambda rows, template: [*right(rows, template), ROWS[1]])
    code, out, _ = run_command(capsys, "verify", "--op", "attention", "--dtype", "fp32")
    assert code == 1
    assert "FAILED   attention cpu d_qkv" in out


def test_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(options, "installed", lambda peer: False)
    code, _, err = run_command(capsys, "verify", "--against", "openclip")
    assert code == 2
    assert "--against openclip: not installed; pip install open-clip-torch" in err
    monkeypatch.setattr(plan, "installed", lambda peer: False)
    (row,) = (row for row in plan.not_run(Options(ops=("model",))) if row.op == "openclip")
    assert row.verdict == SKIP
    assert "OpenCLIP is not installed" in row.reason


def test_interruption_prints_what_is_there(capsys, tmp_path, one_leg, monkeypatch):
    right, calls = run.timed, []

    def interrupted(rows, template):
        calls.append(template)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(rows, template)

    monkeypatch.setattr(run, "timed", interrupted)
    files = ("--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml")
    code, out, _ = run_command(capsys, "verify", "--op", "attention", *files)
    assert code == 130
    assert out.splitlines()[-1].endswith("INTERRUPTED, the rest was not run")
    rows, rest = read_json(tmp_path / "v.json")
    assert rows
    assert not rest["complete"]
    assert ET.parse(tmp_path / "v.xml").getroot().get("tests") == str(len(rows))


def test_rows_are_on_disk_after_every_case(tmp_path, one_leg):
    path, seen = tmp_path / "v.json", []

    def look(group):
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
    rows = run_verify(Options(ops=("attention",), dtypes=("fp32",), legs=("interpreter",), quick=True))
    assert len(rows) > 5
    assert {(row.op, row.leg) for row in rows} == {("attention", "interpreter")}


@pytest.mark.parametrize("leg", LEGS)
def test_clips_own_shapes_are_there(leg):
    shapes = {name: [case.shape for case in spec.cases if leg in case.legs] for name, spec in specs().items()}
    assert {(50, False), (77, True), (197, False), (257, False), (577, False)} <= {
        (s.tokens, s.causal) for s in shapes["attention"]
    }
    assert {64, 80, 88, 104} <= {s.head_dim for s in shapes["attention"]}
    patches = {(s.patch_size, s.uint8) for s in shapes["patch_embed"]}
    assert {(p, kind) for p in (14, 16, 32) for kind in (True, False)} <= patches
    if leg != "interpreter":
        assert {512, 640, 768, 1024} <= {s.embed_dim for s in shapes["contrastive_loss"]}
        assert max(s.pairs for s in shapes["contrastive_loss"]) > 4000
