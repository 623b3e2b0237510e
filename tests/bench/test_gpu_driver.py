"""Test ``python3 -m bench.gpu``: a stop at any moment keeps the results so far, and a rehearsal is marked as one."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from clipfast.bench import checkout, gpu, gpu_environment, gpu_kernels, gpu_page, gpu_samples
from clipfast.bench import cli as bench_cli
from clipfast.bench.stub import build
from clipfast.bench.stub import gpu as stub_gpu
from clipfast.cli.main import main

from .conftest import CPU, ROOFS, break_loss

LATE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(4)
open(sys.argv[1], "w")
"""
HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {late!r}, {path!r}])
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far: 7")
"""


def step(name, code, seconds=20.0, **kwargs):
    """Return a step of the GPU run that executes Python code."""
    return gpu.Step(name, [sys.executable, "-c", code], seconds, **kwargs)


def results_in(summary):
    """Return the result of each step in the summary of the GPU run."""
    found = (re.fullmatch(r"(.{12}) (.*?) +[\d.]+ s", line) for line in summary.splitlines())
    return {match[1].strip(): match[2] for match in found if match}


def test_steps_that_fail_or_hang_do_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 2.0)
    todo = [
        step("fails", "raise SystemExit(3)"),
        # This step starts a child process that ignores interrupts. The child must not outlive the step.
        step("hangs", HANGS.format(late=LATE, path=str(tmp_path / "late")), seconds=5.0),
        gpu.Step("tool", ["no-such-tool-anywhere"], 20),
        step("asks", "import os; print('got', os.environ['MINE'])", environment={"MINE": "yes"}),
        gpu.Step("told", [sys.executable, "-c", "import sys; print('has', sys.argv[1])", gpu.LEFT], 40.0),
    ]
    start = time.monotonic()
    assert gpu.run_steps(todo, tmp_path, dict(os.environ), total_s=85.0) == 1
    summary = (tmp_path / "summary.txt").read_text()
    expected = {"fails": "exit code 3", "hangs": "stopped after 3 s", "tool": "not here", "asks": "ok", "told": "ok"}
    assert results_in(summary) == expected
    assert "so far: 7" in summary
    assert "got yes" in summary
    # Time that a step leaves goes to the next step, so the last step has all of it.
    (told,) = re.findall(r"has (\d+)", summary)
    assert 40 < int(told) <= 85 - gpu.MARGIN_S
    assert gpu.run_steps([step("late", "pass")], tmp_path, dict(os.environ), total_s=2.5) == 1
    assert "no time left" in (tmp_path / "summary.txt").read_text()
    time.sleep(max(0.0, 6.5 - (time.monotonic() - start)))
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_keeps_what_is_done(number, tmp_path):
    code = f"""
import os, signal, sys
from pathlib import Path
from clipfast.bench import gpu
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
late = "import time; print('begun', flush=True); time.sleep(30)"
todo = [gpu.Step(n, [sys.executable, "-c", c], 60) for n, c in (("first", "print(1)"), ("second", late), ("third", ""))]
sys.exit(gpu.run_steps(todo, Path({str(tmp_path)!r}), dict(os.environ)))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    log = tmp_path / "log.txt"
    end = time.monotonic() + 30
    while time.monotonic() < end and "\nbegun" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.1)
    driver.send_signal(number)
    assert driver.wait(timeout=20) == 1
    assert results_in((tmp_path / "summary.txt").read_text()) == {"first": "ok", "second": "interrupted"}


def test_every_part_ends_in_time_and_its_options_exist(tmp_path, capsys):
    # A step with options that its command does not know would only print a usage message on the GPU machine.
    for part in gpu.PARTS:
        total_s = gpu.HOUR_S if part == "all" else gpu.PART_S
        for stub in (False, True):
            found = gpu.steps(part, tmp_path, total_s, stub=stub)
            assert sum(step.seconds for step in found) < total_s < (3600 if part == "all" else 600)
            for step in found:
                assert (step.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}) == (step.name == "sanitizer")
                assert ("clipfast.bench.stub.values" in step.command) == (stub and "pytest" in step.command)
        for step in found:
            arguments = ["7" if argument == gpu.LEFT else argument for argument in step.command[4:]]
            if step.command[3] == "clipfast.bench":
                parser = argparse.ArgumentParser()
                bench_cli.add_commands(parser)
                parsed = parser.parse_args(arguments)
                if hasattr(parsed, "shape"):
                    parsed.device = "cpu"
                    assert bench_cli._plan(parsed, CPU)
            elif step.command[3] == "clipfast":
                with pytest.raises(SystemExit, match="0"):
                    main([arguments[0], "--help"])
                help_text = capsys.readouterr().out
                assert [word for word in arguments if word.startswith("--") and word not in help_text] == []


def test_summary_is_of_this_run_and_names_refusals_and_a_rehearsal(tmp_path):
    candidates = [
        {"name": "clipfast", "refused": "OutOfMemoryError: no", "eager": None},
        {"name": "slow", "refused": None, "eager": "RuntimeError: syncs"},
        {"name": "fine", "refused": None, "eager": None},
    ]
    case = {"op": "loss", "shape": {"pairs": 8}, "dtype": "bf16", "candidates": candidates}
    for name in ("bench-step.json", "verify.json", "mine.txt"):
        (tmp_path / name).write_text("of an earlier run")
    gpu.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "bench-loss.json").write_text(json.dumps({"cases": [case]}))
    gpu.summarise([gpu.Done("loss", "stopped after 9 s", 9.0, ["a table"])], tmp_path, stub=True)
    summary = (tmp_path / "summary.txt").read_text()
    for expected in ("^a table$", "refused: loss .*clipfast: OutOfMemoryError", "no CUDA graph: loss .*slow: .*syncs"):
        assert len(re.findall(expected, summary, re.MULTILINE)) == 1, expected
    assert results_in(summary) == {"loss": "stopped after 9 s"}
    assert "fine" not in summary
    assert summary.splitlines()[0] == summary.splitlines()[-1] == gpu.STUB_NOTE


def test_smoke_says_which_op_is_wrong(monkeypatch, capsys):
    break_loss(monkeypatch)
    monkeypatch.setattr(gpu_environment.machine, "measure_roofs", lambda *args: dict.fromkeys(ROOFS, 1e12))
    assert gpu_environment.main() == 1
    printed = capsys.readouterr().out
    assert "contrastive_loss.fwd_bwd: RuntimeError: illegal instruction" in printed
    assert "attention.fwd_bwd: right" in printed


def run_beside(site, code, folder):
    """Return the output of Python code that imports the benchmark's packages from ``site`` first."""
    command, environment = [sys.executable, "-P", "-c", code], checkout.environment_with(site)
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_package_runs_from_links_alone(tmp_path):
    # A GPU machine that is made for PyTorch and Triton lacks the packages that the code below hides.
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
    assert all(path.startswith(str(site)) for path in run_beside(site, code, tmp_path).split())
    # The links are made again over the existing ones, and over the files that Python has added.
    (site / "clipfast" / "__pycache__").mkdir(exist_ok=True)
    (site / "clipfast" / "__pycache__" / "x.pyc").touch()
    assert checkout.link_packages(site) == site
    # tests/conftest.py puts the checkout on the import path, for the processes that tests start. The links must stay
    # before it, since clipfast/ of a checkout is not a complete package.
    code = """
import importlib.machinery, runpy, sys
runpy.run_path("tests/conftest.py")
print(importlib.machinery.PathFinder.find_spec("clipfast", sys.path).origin)
"""
    assert run_beside(site, code, checkout.ROOT).startswith(str(site))


def test_a_checkout_is_never_replaced_by_links(tmp_path):
    source = tmp_path / "clipfast" / "mine.py"
    source.parent.mkdir()
    source.touch()
    with pytest.raises(FileExistsError, match=r"mine\.py"):
        checkout.link_packages(tmp_path)
    assert source.exists()


def test_what_is_written_goes_elsewhere_where_the_checkout_is_read_only(tmp_path, monkeypatch):
    def read_only(site):
        """Refuse to put links into the checkout, as if the GPU run could not write there."""
        if site.is_relative_to(checkout.ROOT):
            raise PermissionError(site)
        return site

    monkeypatch.setattr(gpu, "link_packages", read_only)
    monkeypatch.setattr(gpu, "_writable", lambda folder: False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/behind")
    found = gpu.surroundings(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), "/behind"]
    assert found["TRITON_CACHE_DIR"].startswith(str(tmp_path))


def run_driver(folder, *options):
    """Run ``python3 -m bench.gpu`` and return its exit code and stderr."""
    command = [sys.executable, "-m", "bench.gpu", *options, "--out", str(folder)]
    run = subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True)
    return run.returncode, run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_begins(tmp_path):
    (tmp_path / "summary.txt").write_text("of an earlier run")
    code, error = run_driver(tmp_path)
    assert (code, "no GPU" in error, "--stub" in error) == (2, True, True)
    assert (tmp_path / "summary.txt").read_text() == "of an earlier run"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is a CUDA build")
def test_a_rehearsal_without_a_cuda_build_says_what_it_needs(tmp_path):
    code, error = run_driver(tmp_path, "--stub")
    assert code == 1
    assert "built without CUDA" in error


@pytest.mark.skipif(torch.version.cuda is None, reason="the stub stands in for the GPU of a CUDA build of PyTorch")
@pytest.mark.skipif(build.missing_tool() is not None, reason=f"{build.missing_tool()}")
def test_pytorch_takes_the_stub_for_a_gpu():
    code = """
import torch
x = torch.ones(1000, 1000, device="cuda")
graph, begin = torch.cuda.CUDAGraph(), torch.cuda.Event(enable_timing=True)
with torch.cuda.graph(graph):
    y = x @ x
graph.replay()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y.sum().item()
except RuntimeError as error:
    print(error)
print(torch.cuda.get_device_name(), torch.cuda.memory_allocated() >= 8e6, y.sum().item())
"""
    environment = stub_gpu.gpu_environment()
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "a stream that is captured" in run.stdout
    assert run.stdout.splitlines()[-1] == f"NVIDIA H100 80GB HBM3 ({stub_gpu.MARK}) True 0.0"


@pytest.mark.skipif(torch.version.cuda is None, reason="the stub stands in for the GPU of a CUDA build of PyTorch")
@pytest.mark.skipif(build.missing_tool() is not None, reason=f"{build.missing_tool()}")
def test_a_step_is_captured_before_its_time_begins(tmp_path):
    command = [sys.executable, "-P", "-m", "clipfast.bench", "step", "--device", "cuda", "--seconds", "0.1"]
    command += ["--shape", "model=ViT-T-8-32 batch=2", "--only", "clipfast graphed", "--json", tmp_path / "step.json"]
    subprocess.run(command, env=stub_gpu.gpu_environment(), capture_output=True, check=True)
    (case,) = json.loads((tmp_path / "step.json").read_text())["cases"]
    eager, graphed = case["candidates"]
    assert graphed["refused"] is None
    assert max(graphed["samples_s"]) < 0.2 * min(eager["samples_s"])  # the host launches one graph
    assert graphed["peak_bytes"] > 0.5 * eager["peak_bytes"]  # a replay itself allocates nothing


def test_on_the_stub_only_comparisons_of_values_are_forgiven(tmp_path):
    (tmp_path / "test_it.py").write_text("""
import torch
def test_values(): assert torch.equal(torch.ones(2), torch.zeros(2))
def test_no_values(): torch.ones(0).max()
def test_refused(): raise RuntimeError("Triton Error [CUDA]: tensor map: box dimension 1 is 257")
def test_right(): pass
""")
    options = ["-q", "-p", "no:cacheprovider", "-p", "clipfast.bench.stub.values", "-rfs"]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "1 failed, 1 passed, 2 skipped" in run.stdout
    assert "FAILED test_it.py::test_refused" in run.stdout


def test_clocks_and_throttling_are_sampled_during_each_step(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\nwhile :; do echo '1755, 690.5, 61, Active, Not Active, Not Active, Not Active'; "
        "echo '1410, [N/A], 65, Not Active, Not Active, Not Active, Active'; sleep 0.2; done\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    out.mkdir()
    assert gpu.run_steps([step("works", "import time; time.sleep(0.7); print('done')")], out, dict(os.environ)) == 0
    (line,) = re.findall("^GPU during this step: .*$", (out / "summary.txt").read_text(), re.MULTILINE)
    assert re.search(r"15\d\d MHz \(1410 to 1755\), 69\d W \(690 to 690\), 63 °C", line)
    assert re.search(r"sw power cap in \d+ of \d+ s, hw thermal slowdown in", line)
    assert "hw slowdown" not in line
    assert gpu_samples.described(["no devices were found"]) is None


def test_the_page_has_each_claim_with_its_prediction_and_measurement(tmp_path, capsys, monkeypatch):
    what = {"shape": {"pairs": 8}, "dtype": "bf16"}
    parts = [{"kernel": "_stats_kernel", "launches": 2, "prediction": {"seconds": 1e-3}}]
    parts.append({"kernel": "_odd_kernel", "launches": 1, "prediction": None})
    forecast = {"name": "contrastive_loss", **what, "corrected": {"seconds": 3e-3}, "parts": parts}
    candidates = [
        {"name": "clipfast", "median_s": 4e-3, "refused": None},
        {"name": "OpenCLIP", "median_s": 6e-3, "refused": None},
        {"name": "memeff", "refused": "missing: memeff"},
    ]
    case = {"op": "contrastive_loss.fwd_bwd", **what, "candidates": candidates, "telemetry": {"throttled": True}}
    step = {"shape": {"model": "ViT-B-32", "batch": 8}, "dtype": "bf16"}
    times = {"clipfast": 3e-3, "clipfast padded": 4e-3, "clipfast graphed": 2e-3, "OpenCLIP": 6e-3}
    timed = [{"name": name, "median_s": seconds, "refused": None} for name, seconds in times.items()]
    whole = {"op": "step", **step, "candidates": timed, "telemetry": {"throttled": None}}
    of_step = {"name": "step", **step, "corrected": {"seconds": 1e-3}, "eager_seconds": 5e-3, "parts": []}
    (tmp_path / "predicted.json").write_text(json.dumps({"forecasts": [forecast, of_step]}))
    (tmp_path / "bench-loss.json").write_text(json.dumps({"cases": [case]}))
    (tmp_path / "bench-step.json").write_text(json.dumps({"cases": [whole]}))
    (tmp_path / "kernels.json").write_text(json.dumps({"contrastive_loss pairs=8 bf16": {"_stats_kernel": 1e-3}}))
    monkeypatch.setattr(sys, "argv", ["gpu_page", str(tmp_path), "--note", gpu.STUB_NOTE])
    assert gpu_page.main() == 0
    rows = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["contrastive_loss pairs=8 bf16", "3.00 ms", "4.00 ms, throttled", "0.75"],
        ["beside OpenCLIP", "6.00 ms, throttled", "1.50"],
        ["beside memeff", "not timed: memeff"],
        ["kernel _stats_kernel", "2.00 ms", "1.00 ms", "2.00"],
        ["step model=ViT-B-32 batch=8 bf16", "3.00 ms"],
        # An eager step is predicted to take the host's time if that is longer, and a graph to take the GPU's.
        ["clipfast padded", "5.00 ms", "4.00 ms", "1.25"],
        ["clipfast graphed", "1.00 ms", "2.00 ms", "0.50"],
        ["beside OpenCLIP", "6.00 ms", "2.00"],
    ]
    page = (tmp_path / "page.html").read_text()
    assert gpu.STUB_NOTE in page
    assert "4.00 ms, throttled" in page


def test_times_of_kernels_are_those_of_one_call_and_pytorchs_are_added_up():
    events = [("_stats_kernel", 30.0), ("_stats_kernel", 50.0), ("sm90_gemm", 10.0), ("Memset", 2.0)]
    found = gpu_kernels.per_call(events, calls=2)
    assert found == {"_stats_kernel": pytest.approx(40e-6), gpu_kernels.OTHERS: pytest.approx(6e-6)}
