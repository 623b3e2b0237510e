"""Test golden curves of training: bits must be equal on the same kind of device, others have a tolerance, and a single
changed rounding is found.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from clipfast.cli.main import main
from clipfast.kernels import configs
from clipfast.kernels.launch import INTERPRET
from clipfast.kernels.layer_norm import cpu as norm_cpu
from clipfast.kernels.layer_norm import kernels as norm_kernels
from clipfast.verify import curve, golden
from clipfast.verify.golden import verify_golden
from clipfast.verify.report import FAIL, PASS

from .test_faults import ROOT, changed

RIGHT = norm_kernels.centred_rows


@pytest.fixture
def two_steps(monkeypatch):
    """Let golden curves have two steps of training only, so that the test is quick."""
    monkeypatch.setattr(golden, "STEPS", 2)


def outcomes(path):
    """Return the verdicts and reasons of a comparison of new curves of training with the golden ones in a file."""
    rows = verify_golden(path, "cpu")
    assert [(row.dtype, row.output) for row in rows] == [
        (precision, output) for precision in ("float32", "amp") for output in ("loss", "gradient norm")
    ]
    return {row.verdict for row in rows}, [row.reason for row in rows]


def test_bits_are_equal_and_one_other_rounding_is_found(tmp_path, capsys, two_steps, monkeypatch):
    path = tmp_path / "golden.json"
    assert main(["verify", "--golden", str(path)]) == 0
    assert "compared with nothing" in capsys.readouterr().out
    assert main(["verify", "--golden", str(path)]) == 0
    assert "4 passed" in capsys.readouterr().out

    def rounded_up(results):
        """Round one value of a layer norm the other way, a fault that the curve must find."""
        value = results[0].view(-1)[5]
        value.copy_(torch.nextafter(value, value.new_tensor(torch.inf)))
        return results

    monkeypatch.setattr(norm_cpu, "forward", changed(norm_cpu.forward, rounded_up))
    configs.forget_plans()
    assert main(["verify", "--golden", str(path), "--json", str(tmp_path / "a.json")]) == 1
    failed = [row for row in json.loads((tmp_path / "a.json").read_text())["rows"] if row["verdict"] == FAIL]
    assert {row["dtype"] for row in failed} == {"float32", "amp"}
    assert all(
        "differs from step 1 on" in row["reason"] and "all bits must be equal" in row["reason"] for row in failed
    )


@triton.jit
def one_up(s, mask_n, N: tl.constexpr, eps):
    """Return what ``centred_rows`` does, but with the next larger float32 for each rstd, a fault of one rounding."""
    centred, mean, rstd = RIGHT(s, mask_n, N, eps)
    return centred, mean, (rstd.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)


@pytest.mark.skipif(not INTERPRET, reason="kernels are interpreted only with TRITON_INTERPRET=1")
def test_one_other_rounding_in_an_interpreted_kernel_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "STEPS", 1)
    monkeypatch.setattr(curve, "BATCH", 2)
    path = tmp_path / "golden.json"
    verify_golden(path, "cpu")
    assert "interpreted kernels on" in path.read_text()
    assert outcomes(path)[0] == {PASS}
    monkeypatch.setattr(norm_kernels, "centred_rows", one_up)
    verdicts, reasons = outcomes(path)
    assert verdicts == {FAIL}
    assert all("differs from step 1 on" in reason for reason in reasons)


@pytest.mark.long
@pytest.mark.skipif(INTERPRET, reason="this process interprets kernels itself")
def test_interpreted_kernels_in_another_process():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "interpreted_kernel_is_found"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert "1 passed" in run.stdout, run.stdout


def test_another_kind_of_device_or_version_has_a_tolerance(tmp_path, two_steps, monkeypatch):
    path = tmp_path / "golden.json"
    verify_golden(path, "cpu")
    raw = json.loads(path.read_text())
    (entry,) = raw["devices"].values()
    for values in entry["curves"].values():
        values["loss"][1] = (1.000001 * float.fromhex(values["loss"][1])).hex()
    path.write_text(json.dumps(raw | {"devices": {"another card": entry}}))
    verdicts, reasons = outcomes(path)
    assert verdicts == {PASS}
    assert "by up to 1.0" in reasons[0]
    assert "compared with another card" in reasons[0]
    entry["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(raw | {"devices": {golden.kind_of_device("cpu"): entry}}))
    verdicts, reasons = outcomes(path)
    assert verdicts == {PASS}
    assert "torch 1.0 -> " in reasons[0]
    right, entry["curves"]["float32"]["loss"][1] = entry["curves"]["float32"]["loss"][1], "nan"
    path.write_text(json.dumps(raw))
    assert FAIL in outcomes(path)[0]
    entry["curves"]["float32"]["loss"][1] = right
    entry["curves"]["amp"]["loss"][1] = "0x1.0p+1"
    entry["curves"]["float32"]["loss"][1] = "0x1.0p+1"
    path.write_text(json.dumps(raw))
    assert FAIL in outcomes(path)[0]
    verify_golden(path, "cpu", update=True)
    assert outcomes(path)[0] == {PASS}


HEAD = f'{{"format": "{golden.FORMAT}", "model": "{golden.MODEL_NAME}"'


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": "other"}', HEAD + "}", HEAD + ', "devices": {"a card": {"versions": {}, "curves": {}}}}'],
)
def test_a_file_that_is_no_golden_curve_is_refused(text, tmp_path, capsys):
    path = tmp_path / "golden.json"
    path.write_text(text)
    assert main(["verify", "--golden", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
