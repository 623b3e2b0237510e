"""Test ``bench host``, which prints a line for each candidate with times and kernels, on CPU tensors and on the stub
driver.
"""

import json
import re
import subprocess
import sys

import pytest

from clipfast.bench.cli import main
from clipfast.bench.stub import build, counts
from clipfast.kernels.spec import specs


def parsed(printed):
    """Return the rows of a table by title: the times, ratios and numbers of kernels of each candidate."""
    rows = {}
    for line in printed.splitlines()[3:]:
        if not line.startswith(" "):
            found = rows[line] = {}
        elif numbers := re.fullmatch(r"  (.{26}) ([\d. ]{39})   ([\d /]+)", line):
            found[numbers[1].strip()] = (*map(float, numbers[2].split()), *map(int, numbers[3].split("/")))
    return rows


def test_ops_and_models_on_cpu_tensors(capsys, tmp_path):
    path, page = tmp_path / "host.json", tmp_path / "page.md"
    options = ["--model", "ViT-T-8-32", "--rounds", "2", "--json", str(path)]
    assert main(["host", "--op", "bias_gelu", "top_k", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("CPU tensors, fp32: ")
    op, search, step, image, text = parsed(printed).values()
    spec = specs()["bias_gelu"]
    expected = counts.count(spec, spec.small[0])
    *_, forward, both = op["clipfast"]
    assert (forward, expected.backward_launches) == (1, 1)
    assert both == sum(vars(expected).values())
    assert op["PyTorch"][-2] == 2  # PyTorch needs two ops: the sum, and the activation
    # The second and the fourth figure are ratios to PyTorch's times, which are 1 for PyTorch itself.
    assert (op["PyTorch"][1], op["PyTorch"][3]) == (1.0, 1.0)
    for found, numbers in (op, 6), (search, 3), (step, 3), (image, 3), (text, 3):
        assert {"clipfast", "PyTorch"} <= set(found)
        assert all(len(figures) == numbers and min(figures) > 0 for figures in found.values())
    activation = json.loads(path.read_text())["rows"][0]
    assert activation["shape"] == spec.small[0].to_dict()
    us, _, more_us, *_ = op["clipfast"]
    assert activation["found"]["clipfast"] == {"forward": [us, forward], "both": [more_us, both]}
    page.write_text("The host:\n<!-- bench host.json -->\n<!-- /bench -->\n")
    assert main(["table", "--page", str(page), "--results", str(tmp_path)]) == 0
    lines = page.read_text().splitlines()
    assert len(lines) == 2 + 2 + 5 + 2 + 1  # the head, and a row for each call
    ours, others = lines[4].split(" | ")[1:3]
    assert float(ours.split(" / ")[0]) == pytest.approx(us, rel=0.01)
    assert others.startswith("PyTorch ")


def test_what_cannot_be_measured_is_refused(capsys):
    assert main(["host", "--op", "norm"]) == 2
    assert "no op 'norm': choose from" in capsys.readouterr().err
    assert main(["host", "--op", "--model", "RN50"]) == 2
    assert "RN50 has a ResNet" in capsys.readouterr().err


@pytest.mark.skipif(build.missing_tool() is not None, reason=f"{build.missing_tool()}")
def test_on_the_stub_the_launcher_of_triton_is_timed():
    options = ["host", "--stub", "--op", "bias_gelu", "top_k", "--model", "--rounds", "2"]
    command = [sys.executable, "-m", "clipfast.bench", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing runs" in done.stdout.splitlines()[0]
    activation, search = parsed(done.stdout).values()
    assert (len(activation["clipfast"]), len(search["clipfast"])) == (6, 3)
