"""The driver of ``make gpu``: a stop at any moment leaves what came before."""

import os
import subprocess
import sys
import time

import pytest

from clipfast.bench import checkout, gpu

from ..conftest import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="runs processes of its own")


def step(name, code, seconds=20.0):
    return gpu.Step(name, [sys.executable, "-c", code], seconds, "log.txt")


def test_steps_that_fail_or_hang_do_not_stop_the_others(tmp_path, capsys):
    # the hanging step starts a process of its own, which must not outlive it
    hang = "import subprocess, sys; print('x', flush=True); subprocess.run([sys.executable, '-c', {!r}])".format(
        f"import time; time.sleep(6); open({str(tmp_path / 'late')!r}, 'w')"
    )
    todo = [
        step("fails", "raise SystemExit(3)"),
        step("hangs", hang, seconds=5.0),
        gpu.Step("tool", ["no-such-tool-anywhere"], 20, "log.txt"),
        step("works", "print('here')"),
    ]
    assert gpu.run_steps(todo, tmp_path, dict(os.environ)) == 1
    summary = (tmp_path / "summary.txt").read_text()
    results = {line.split()[0]: " ".join(line.split()[1:-2]) for line in summary.splitlines() if line.endswith(" s")}
    assert results == {"fails": "exit code 3", "hangs": "stopped after 5 s", "tool": "not here", "works": "ok"}
    assert capsys.readouterr().out.rstrip().endswith(summary.rstrip())
    assert "here" in (tmp_path / "log.txt").read_text()
    time.sleep(2)
    assert not (tmp_path / "late").exists()


def test_everything_right_is_exit_code_0(tmp_path):
    assert gpu.run_steps([step("works", "pass")], tmp_path, dict(os.environ)) == 0


def test_no_step_starts_after_the_end(tmp_path):
    todo = [step("works", "pass"), step("late", "pass")]
    assert gpu.run_steps(todo, tmp_path, dict(os.environ), total_s=4.0) == 1
    assert "no time left" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("part", gpu.PARTS)
def test_steps_come_in_order_of_value_and_leave_few_files(part, tmp_path):
    found = [step.name for step in gpu.steps(part, tmp_path, dry=False)]
    order = ["environment", "tests", "verify", "ops", "steps", "tune", "sanitizer"]
    assert found == [name for name in order if name in found]
    assert found[:2] == ["environment", "tests"]


def test_package_runs_from_links_alone(tmp_path):
    # on a GPU machine with PyTorch and Triton, these are what is missing
    site = checkout.link_packages(tmp_path / "site")
    code = """
import sys
sys.modules.update(dict.fromkeys(["ftfy", "webdataset", "open_clip", "pynvml", "jsonschema", "matplotlib"]))
import clipfast, clipfast.kernels as k, clipfast.bench.cli as b
from clipfast.bench.suites import SUITES, build
for name in SUITES:
    build(name, SUITES[name].smallest, "fp32", __import__("torch").device("cpu"))
assert clipfast.tokenize("a photo of a cat")[0, 1] == 320
print(clipfast.__file__, k.__file__, b.__file__)
"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert all(path.startswith(str(site)) for path in run.stdout.split())
    # and again, over what is there
    assert checkout.link_packages(site) == site
