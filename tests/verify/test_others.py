"""Test checks of other people's kernels: a fault planted in a kernel is found, and a mistake in a check is named."""

import importlib.util
import json
import os
import re
import struct
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from clipfast.bench.inspection import offline
from clipfast.bench.inspection.control_bits import check_control_bits
from clipfast.bench.inspection.others import compiled
from clipfast.cli.main import main
from clipfast.kernels.spec import CPU, EXPANDED, INTERPRETER
from clipfast.verify import KernelCheck, Options, run_verify
from clipfast.verify.child import groups_of_child
from clipfast.verify.ops import verify_case
from clipfast.verify.options import SANITIZER
from clipfast.verify.other_runs import _not_run, groups_of_other, record
from clipfast.verify.others import check_op, load
from clipfast.verify.report import FAIL, PASS, SKIP
from clipfast.verify.sanitizer import lacks

ROOT = Path(__file__).parent.parent.parent
KERNELS = Path(__file__).parent / "other_kernels.py"
NAMES = ("SOFTMAX", "LAYER_NORM", "GELU", "MATMUL", "COLUMN_SUM")
# By the name of the fault: the check that finds it, the text of other_kernels.py that is replaced, its replacement, and
# the leg that finds the fault if not both do. The interpreter finds no races, since it runs programs one after another,
# and no access beyond the end of a tensor.
FAULTS = {
    "mask too wide": ("SOFTMAX", "offs < width", "offs <= width", SANITIZER),
    "padding with zeros": ("SOFTMAX", 'float("-inf")', "0.0"),
    "exponentials overflow": ("SOFTMAX", "x - tl.max(x, 0)", "x"),
    "rows taken as dense": ("SOFTMAX", "row * x_stride", "row * width"),
    "exponents in 16 bits": ("SOFTMAX", "tl.exp(x)", "tl.exp(x.to(tl.float16).to(tl.float32))"),
    "denominator with an epsilon": ("SOFTMAX", "tl.sum(e, 0)", "(tl.sum(e, 0) + 1e-5)"),
    "input overwritten": ("SOFTMAX", "out = torch.empty(x.shape, dtype=x.dtype, device=x.device)", "out = x"),
    "epsilon dropped": ("LAYER_NORM", "/ width + eps", "/ width"),
    "mean of the padded row": ("LAYER_NORM", "mean = tl.sum(x, 0) / width", "mean = tl.sum(x, 0) / BLOCK"),
    "padding in the variance": ("LAYER_NORM", "tl.where(mask, x - mean, 0.0)", "x - mean"),
    "weight forgotten": ("LAYER_NORM", "centred * rstd * weight", "centred * rstd"),
    "last row lost": ("LAYER_NORM", "range(program, rows,", "range(program, rows - 1,"),
    "a term of the gradient lost": ("LAYER_NORM", " - normed * slope", ""),
    "gradient summed in 16 bits": (
        "LAYER_NORM", "d_weight += grad * normed",
        "d_weight = (d_weight + grad * normed).to(tl.float16).to(tl.float32)",
    ),
    "partial sums at one place": ("LAYER_NORM", "d_weight_ptr + program * width", "d_weight_ptr"),
    "gradient taken as dense": ("LAYER_NORM", "grad = grad.contiguous()", "grad = grad", SANITIZER),
    "last element lost": ("GELU", "offs < count", "offs < count - 1"),
    "mask lost": ("GELU", "offs < count", "offs >= 0", SANITIZER),
    "another GELU": ("GELU", "0.5 * x * (1 + tl.erf(x * 0.7071067811865476))", "x * tl.sigmoid(1.702 * x)"),
    "wrong column of the bias": ("GELU", "offs % width", "offs // width"),
    "strides ignored": ("GELU", "x, bias = x.contiguous(), bias.contiguous()", "pass"),
    "last tile lost": ("MATMUL", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "16-bit accumulator": ("MATMUL", '"ieee")', '"ieee").to(tl.float16).to(tl.float32)'),
    "mask of one operand lost": ("MATMUL", " & (offs_k[None, :] < K)", "", SANITIZER),
    "strides swapped": ("MATMUL", "*b.stride()", "b.stride(1), b.stride(0)"),
    "grid of another tile": ("MATMUL", 'triton.cdiv(m, meta["BLOCK_M"])', "triton.cdiv(m, 64)"),
    "store beyond the last row": ("MATMUL", "mask = (offs_m[:, None] < M) & ", "mask = ", SANITIZER),
    "no atomic, no barrier": (
        "COLUMN_SUM", "tl.atomic_add(out_ptr + offs, x,",
        "tl.store(out_ptr + offs, x + tl.load(out_ptr + offs, mask=mask),", SANITIZER,
    ),
    "sum into memory that holds anything": ("COLUMN_SUM", "torch.zeros", "torch.empty"),
    "sum goes on from call to call": (
        "COLUMN_SUM", "torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)",
        "column_sum.__dict__.setdefault('out', torch.zeros(x.shape[1], dtype=torch.float32, device=x.device))",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Return the checks of the right kernels, and of copies with a fault, by the name of the kernel or of the fault."""
    folder = tmp_path_factory.mktemp("others")
    found = {name: f"{KERNELS}:{name}" for name in NAMES}
    for number, (fault, (name, old, new, *_)) in enumerate(FAULTS.items()):
        source = KERNELS.read_text()
        assert old in source, fault
        copy = folder / f"fault_{number}.py"
        rename = f"import dataclasses\n{name} = dataclasses.replace({name}, name={fault!r})\n"
        copy.write_text(source.replace(old, new) + rename)
        found[fault] = f"{copy}:{name}"
    return found


@pytest.mark.parametrize(
    "leg", [INTERPRETER, pytest.param(SANITIZER, marks=pytest.mark.skipif(bool(lacks()), reason=lacks()))]
)
def test_right_kernels_pass_and_planted_faults_are_found(texts, leg):
    # An interpreted kernel that writes beyond a tensor may end the process, so only the sanitizer ttsem runs the faults
    # that the interpreter would not find.
    chosen = {name: text for name, text in texts.items() if leg == SANITIZER or SANITIZER not in FAULTS.get(name, ())}
    options = Options(others=tuple(chosen.values()), dtypes=("fp32",), legs=(leg,), device="cpu")
    verdicts = {}
    for rows in groups_of_child(options.to_dict(), leg, 300):
        for row in rows:
            verdicts.setdefault(row.op, set()).add(row.verdict)
    assert {name for name, found in verdicts.items() if found == {PASS}} == set(NAMES)
    assert {name for name, found in verdicts.items() if FAIL in found} == chosen.keys() - set(NAMES)


def check(**changes):
    """Return a check of a function that launches nothing, with some of its attributes replaced."""
    given = {
        "function": lambda x: 2 * x,
        "reference": lambda x: x + x,
        "inputs": lambda draw, rows: {"x": draw.normal(rows, 3)},
        "shapes": [{"rows": 4}],
        "name": "DOUBLE",
    }
    return KernelCheck(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"function": None}, "function must be a function, got None"),
        ({"shapes": []}, "shapes is empty"),
        ({"shapes": [{"rows": 1.5}]}, "dict of integers by name, got {'rows': 1.5}"),
        ({"dtypes": ("fp32", "fp61")}, "dtypes has 'fp61' .did you mean fp16."),
        ({"dtypes": "fp32"}, "dtypes must be a tuple of names, got 'fp32'"),
        ({"dtypes": (torch.float64,)}, "dtypes has torch.float64; known: fp32"),
        ({"scaled": "x"}, "scaled must be a tuple of names, got 'x'"),
        ({"float32": "x"}, "float32 must be a tuple of names, got 'x'"),
        ({"dtypes": ()}, "dtypes is empty"),
        ({"extremes": ("huge",)}, "extremes has 'huge'.*known: large, tiny, zeros"),
        ({"inputs": lambda draw, width: {}}, "inputs.draw, rows=4. raised TypeError: .*'rows'"),
        ({"inputs": lambda draw, rows: {}}, "inputs must return a dict of tensors by name"),
        ({"inputs": lambda draw, rows: {"x": [1.0]}}, "inputs returned list for 'x', which must be a tensor"),
        ({"scaled": ("y",)}, "scaled names 'y'; the inputs are x"),
        ({"reference": lambda y: y}, "the reference raised at rows=4: TypeError: .*'x'"),
        ({"reference": lambda x: None}, "the reference must return tensors, got NoneType"),
        ({"reference": lambda x: x.float()}, "torch.float32 for inputs in torch.float64"),
        ({"function": lambda y: y}, "the function raised at rows=4: TypeError: .*'x'"),
        ({"function": lambda x: None}, "the function raised at rows=4: TypeError: .*must return.*, got NoneType"),
        ({"floor": lambda itemsize: None}, "floor.itemsize, rows=4. raised TypeError: .*'rows'"),
        ({"floor": lambda itemsize, rows: 5}, "floor must return a clipfast.kernels.spec.Floor, got int"),
    ],
)
def test_a_mistake_in_a_check_is_named(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check(**changes).spec()


def test_dtypes_have_three_names():
    assert check(dtypes=("fp32", "float16", torch.bfloat16)).dtypes == ("fp32", "fp16", "bf16")


@pytest.mark.parametrize(
    ("most", "leg", "recorded"), [(9, INTERPRETER, "rows=9"), (1000, INTERPRETER, "rows=1000"), (0, CPU, "")]
)
def test_a_function_may_launch_its_kernel_at_some_sizes_only(most, leg, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"sometimes_{most}.py"
    file.write_text(SOMETIMES.replace("MOST", str(most)))
    options = Options(others=(f"{file}:DOUBLE",), dtypes=("fp32",), device="cpu", quick=True)
    compiled_at = []
    rows = [
        row
        for rows in groups_of_other(f"{file}:DOUBLE", options, lambda one: compiled_at.append(one) or ())
        for row in rows
    ]
    assert {row.leg for row in rows if row.check == "accuracy"} >= {leg}
    assert {row.verdict for row in rows if row.check == "accuracy"} == {PASS}
    assert {one.shape for one in compiled_at if one.choices} == {recorded} - {""}


SOMETIMES = f"""
import importlib.util
import torch
from clipfast.verify import KernelCheck

spec = importlib.util.spec_from_file_location("other_kernels", {str(KERNELS)!r})
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


def double(x):
    return kernels.gelu(x, x[0]) if len(x) <= MOST else torch.nn.functional.gelu(x + x[0])


DOUBLE = KernelCheck(
    double, lambda x: torch.nn.functional.gelu(x + x[0]), lambda draw, rows: {{"x": draw.normal(rows, 8)}},
    [{{"rows": 4}}, {{"rows": 9}}], real={{"rows": 1000}}, gradients=False, extremes=(),
)
"""


def in_parts(x, detach=False):
    """Return the softmax of ``x``, of which each part is rounded; the gradient of its sum is zero."""
    e = (x - x.detach().amax(-1, keepdim=True)).exp()
    total = e.sum(-1, keepdim=True)
    return e / (total.detach() if detach else total)


@pytest.mark.parametrize(("detach", "verdict"), [(False, PASS), (True, FAIL)])
def test_a_gradient_that_is_exactly_zero_is_held_to_its_usual_size(detach, verdict):
    changes = {"function": lambda x: in_parts(x, detach), "reference": lambda x: x.softmax(-1)}
    spec = check(**changes, inputs=lambda draw, rows: {"x": draw.normal(rows, 100)}).spec()
    (case,) = (case for case in spec.cases if case.layout == EXPANDED)
    rows = {row.output: row for row in verify_case(spec, CPU, case, "float16", quick=True)}
    assert {name: row.verdict for name, row in rows.items()} == {"value": PASS, "d_x": verdict}


def test_results_may_be_a_list():
    two = check(function=lambda x: [2 * x, x], reference=lambda x: [x + x, x]).spec()
    assert {row.verdict for row in verify_case(two, "cpu", two.cases[0], "float32", quick=True)} == {PASS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module:X", "there is no module 'no_such_module'"),
        ("no_such_file.py:X", "there is no file no_such_file.py"),
        ("checks.py", "give MODULE:NAME"),
        ("checks.py:DOUBLE --golden golden.json", "--golden checks no kernels: leave out checks.py:DOUBLE"),
        ("checks.py:DOUBL", "has no 'DOUBL' (did you mean DOUBLE?)"),
        ("checks.py:NUMBER", "is int: it must be a clipfast.verify.KernelCheck or an OpSpec"),
        ("broken.py:X", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_wrong_name_is_named(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("import nowhere\n")
    (tmp_path / "checks.py").write_text(PLAIN)
    assert main(["verify", *text.split()]) == 2
    assert message in capsys.readouterr().err


PLAIN = """
import torch
from clipfast.verify import KernelCheck

NUMBER = 3
DOUBLE = KernelCheck(
    lambda x: 2 * x, lambda x: x + x, lambda draw, rows: {"x": draw.normal(rows, 3)}, [{"rows": 4}], dtypes=("fp32",)
)
WRONG = KernelCheck(
    lambda x: x.T, lambda x: x, lambda draw, rows: {"x": draw.normal(rows, 3)}, [{"rows": 4}], dtypes=("fp32",),
    gradients=False,
)


@torch.library.custom_op("clipfast_test::mutating", mutates_args=())
def mutating(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(1).clone()


MUTATING = KernelCheck(
    mutating, lambda x: x, lambda draw, rows: {"x": draw.normal(rows, 3)}, [{"rows": 4}], dtypes=("fp32",),
    gradients=False,
)
"""


def test_a_function_without_a_kernel_runs_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checks.py").write_text(PLAIN)
    outputs = ["--json", "a.json", "--junit", "a.xml", "--html", "a.html"]
    assert main(["verify", "checks.py:DOUBLE", "checks.py:WRONG", "checks.py:MUTATING", *outputs]) == 1
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    errors = [row for row in rows if row["check"] == "accuracy" and row["leg"] == CPU]
    verdicts = {name: {row["verdict"] for row in errors if row["op"] == name} for name in OPS}
    assert verdicts == {"DOUBLE": {PASS}, "WRONG": {FAIL}, "MUTATING": {PASS}}
    assert {row["output"] for row in rows if row["op"] == "DOUBLE"} >= {"value", "d_x"}
    assert any(row["reason"] == "shape (3, 4), expected (4, 3)" for row in rows)
    assert {row["check"] for row in rows if row["op"] == "MUTATING" and row["verdict"] == FAIL} == {"opcheck"}
    assert len(ET.parse(tmp_path / "a.xml").findall(".//testcase")) == len(rows)
    assert "shape (3, 4), expected (4, 3)" in (tmp_path / "a.html").read_text()
    assert "the function launches no Triton kernel" in capsys.readouterr().out


OPS = ("DOUBLE", "WRONG", "MUTATING")


def test_a_registered_op_of_which_only_kernels_ran_is_reported():
    rows = _not_run("OP", check(op=torch.ops.aten.add), [INTERPRETER], ["float32"], is_triton=True)
    assert "opcheck" in {row.check for row in rows}


def test_an_op_whose_gradients_are_not_checked_needs_no_formula_for_them():
    @torch.library.custom_op("clipfast_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    rows = check_op(check(function=twice, gradients=False), CPU)
    assert {row.verdict for row in rows} == {PASS}, rows


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("MATMUL", "", "", ""),
        ("MATMUL", "tl.dot(a, b,", "tl.dot(a.to(tl.float32), b.to(tl.float32),", "multiplies with none"),
        ("GELU", "tl.erf(x", "tl.erf(x, x", "does not compile"),
    ],
)
def test_what_the_compiler_finds(name, old, new, fault, tmp_path):
    copy = tmp_path / f"compiled_{len(new)}.py"
    copy.write_text(KERNELS.read_text().replace(old, new) if old else KERNELS.read_text())
    *kernels, time = [row for rows in compiled(record(load(f"{copy}:{name}"), "float16", 90)) for row in rows]
    assert kernels
    for row in kernels:
        assert (row.verdict == FAIL) == bool(fault), row.reason
        assert fault in row.reason
    if not fault:
        assert "predicted" in time.reason


def without_stalls(cubin):
    """Return a cubin in which no instruction waits for more than a cycle before the next one, a planted fault."""
    cubin = bytearray(cubin)
    table, size, count, names = struct.unpack_from("<Q", cubin, 40)[0], *struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + number * size) for number in range(count)]
    for name, _, _, _, start, length in sections:
        if cubin[sections[names][4] + name :].startswith(b".text."):
            for place in range(start + 8, start + length, 16):  # control bits are in the upper half of 16 bytes
                (bits,) = struct.unpack_from("<Q", cubin, place)
                struct.pack_into("<Q", cubin, place, bits & ~(15 << 41) | 1 << 41)
    return bytes(cubin)


def test_control_bits_that_are_wrong_are_found():
    pytest.importorskip("basalt", reason="basalt-sass is not installed")
    ((launch,),) = record(load(f"{KERNELS}:GELU"), "float16", 120).choices
    cubin = offline.compile_kernel(launch, 120).asm["cubin"]
    passed, said = check_control_bits(cubin)
    assert (passed, "dependencies checked" in said) == (True, True)
    passed, said = check_control_bits(without_stalls(cubin))
    assert (passed, "cycles" in said) == (False, True)


def test_without_a_checker_of_control_bits_a_row_says_so(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "basalt" else found(name))
    _, (row,) = compiled(record(load(f"{KERNELS}:GELU"), "float16", 120))
    assert (row.check, row.verdict, row.reason[:28]) == ("control bits", SKIP, "basalt-sass is not installed")


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "verify-others.md").read_text(), re.DOTALL)
    assert len(example.splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    (tmp_path / "softmax_check.py").write_text(example)
    assert main(["verify", "softmax_check.py:SOFTMAX", "--quick", "--arch", "90"]) == 0, capsys.readouterr().out
    assert "times the floor" in capsys.readouterr().out


# By the file and the name of a check in others/: the package that it needs, or the environment variable that names the
# folder of its kernels.
OTHERS = {
    "liger.py:LAYER_NORM": "liger_kernel",
    "liger.py:GELU": "liger_kernel",
    "losses.py:MEMEFF": "memeff",
    "losses.py:SIGLIP": "siglip_kernel",
    "hub.py:ROTARY": "HUB_KERNELS",
    "hub.py:LAYER_NORM": "HUB_KERNELS",
    "tutorials.py:SOFTMAX": "TRITON_TUTORIALS",
    "tutorials.py:MATMUL": "TRITON_TUTORIALS",
    "tutorials.py:LAYER_NORM": "TRITON_TUTORIALS",
    "tutorials.py:ATTENTION": "TRITON_TUTORIALS",
}


@pytest.mark.parametrize("text", OTHERS)
def test_published_kernels_are_right_at_plain_inputs(text):
    needs = OTHERS[text]
    if not (needs in os.environ or importlib.util.find_spec(needs)):
        pytest.skip(f"needs {needs}: docs/verify-others.md says where it is from")
    rows = run_verify(Options(others=(f"{KERNELS.parent}/others/{text}",), dtypes=("fp16",), quick=True, archs=(90,)))
    values = [row for row in rows if row.check == "accuracy" and row.output == "value" and "," not in row.case]
    assert values
    assert {row.verdict for row in values} == {PASS}
