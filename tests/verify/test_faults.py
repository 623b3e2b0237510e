"""Test that ``clipfast verify`` finds and names a fault that is planted in an op, a model or a curve of training, and
passes without the fault.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipfast import kernels
from clipfast.kernels import configs
from clipfast.kernels.activation import cpu as activation_cpu
from clipfast.kernels.activation import launches as activation_launches
from clipfast.kernels.attention import cpu as attention_cpu
from clipfast.kernels.attention import op as attention_op
from clipfast.kernels.attention_pool import cpu as pool_cpu
from clipfast.kernels.contrastive import contrastive, nce, nt_xent, sigmoid, small_batch
from clipfast.kernels.contrastive import cpu as loss_cpu
from clipfast.kernels.layer_norm import cpu as norm_cpu
from clipfast.kernels.layer_norm import launches as norm_launches
from clipfast.kernels.patch_embed import cpu as patch_cpu
from clipfast.kernels.patch_embed import launches as patch_launches
from clipfast.kernels.spec import CPU, INTERPRETER, specs
from clipfast.kernels.text_embed import cpu as text_cpu
from clipfast.kernels.text_embed import launches as text_launches
from clipfast.verify import Options, curve, exit_code, models, run_verify
from clipfast.verify.models import verify_model
from clipfast.verify.report import FAIL, PASS
from clipfast.verify.runner import here

from .conftest import GRADIENTS, SMALL

ROOT = Path(__file__).parent.parent.parent
FACTOR = 1.01


def changed(fn, change):
    """Return a kernel's launch ``fn``, or the planner of one, whose results go through ``change``."""

    def wrong(*args, **options):
        """Return the changed result of a kernel, or the function that computes it for a layout."""
        result = fn(*args, **options)
        return changed(result, change) if callable(result) else change(result)

    return wrong


def scaled(fn, index=None):
    """Return a kernel's launch ``fn``, or its planner, with its result, or one of its results, 1% too large."""

    def change(result):
        """Make a result of a kernel too large, by a planted fault."""
        part = result if index is None else result[index]
        if part is not None:
            part.mul_(FACTOR)
        return result

    return changed(fn, change)


def gradient_off(spec, name, factor):
    """Return an op's specification for the verification with the gradient of one input too large by ``factor``."""

    @functools.wraps(spec.op)
    def wrong(**inputs):
        """Call an op with the gradient of one input too large, a fault that the verification must find."""
        x = inputs.get(name)
        if x is not None and x.is_floating_point():
            inputs[name] = x + (factor - 1) * (x - x.detach())
        return spec.op(**inputs)

    return dataclasses.replace(spec, op=wrong)


# By op and output: the module or registered op and its function that compute the output on the CPU, and the output's
# index among the results. Only one output of each function is listed; test_fault_in_each_gradient has the others.
ON_CPU = {
    ("contrastive_loss", "value"): (contrastive._contrastive_fwd, "run", 0),
    ("contrastive_loss", "d_image"): (contrastive._contrastive_bwd, "run", 0),
    ("sigmoid_loss", "value"): (loss_cpu, "add_sigmoid_gradients", None),
    ("sigmoid_loss", "d_image"): (sigmoid._sigmoid_bwd, "run", 0),
    ("info_nce_loss", "value"): (nce._info_nce_fwd, "run", 0),
    ("info_nce_loss", "d_negatives"): (nce._info_nce_bwd, "run", 2),
    ("nt_xent_loss", "value"): (nt_xent._nt_xent_fwd, "run", 0),
    ("nt_xent_loss", "d_logit_scale"): (nt_xent._nt_xent_bwd, "run", 2),
    ("attention", "value"): (attention_cpu, "forward_packed", 0),
    ("attention", "d_qkv"): (attention_cpu, "backward_packed", 0),
    ("patch_embed", "value"): (patch_cpu, "forward", None),
    ("patch_embed", "d_weight"): (patch_cpu, "backward_weight", None),
    ("patch_embed", "d_images"): (patch_cpu, "backward_images", None),
    ("text_embed", "value"): (text_cpu, "forward", 0),
    ("text_embed", "d_token_embedding"): (text_cpu, "backward_token", None),
    ("layer_norm", "value"): (norm_cpu, "forward", 0),
    ("layer_norm", "d_x"): (norm_cpu, "backward", 0),
    ("bias_quick_gelu", "value"): (activation_cpu, "forward", None),
    ("bias_quick_gelu", "d_bias"): (activation_cpu, "backward", 1),
}
# Like ``ON_CPU``, but for the interpreted kernels.
INTERPRETED = {
    ("contrastive_loss", "d_image"): (contrastive._contrastive_bwd, "planner", 0),
    ("nt_xent_loss", "d_logit_scale"): (nt_xent._nt_xent_bwd, "planner", 2),
    ("attention", "d_qkv"): (attention_op._attention_bwd, "planner", 0),
    ("patch_embed", "d_weight"): (patch_launches, "backward_weight", None),
    ("patch_embed", "d_images"): (patch_launches, "backward_images", None),
    ("text_embed", "d_token_embedding"): (text_launches, "backward_token", None),
    ("layer_norm", "d_x"): (norm_launches, "backward", 0),
    ("bias_gelu", "d_bias"): (activation_launches, "backward", 1),
}
LEG = here()
PLACES = {CPU: ON_CPU, INTERPRETER: INTERPRETED}[LEG]


MOST_LOGITS = small_batch.MOST_LOGITS


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send small batches through the blocks of the contrastive loss's CPU path, where faults are planted."""
    monkeypatch.setattr(small_batch, "MOST_LOGITS", 0)


def failures(op: str, dtype: str = "float32") -> tuple[int, set[tuple[str, str, str]]]:
    """Verify ``op`` on the leg of this process, and return the exit code and the op, leg and output of failed rows."""
    rows = run_verify(Options(ops=(op,), dtypes=(dtype,), legs=(LEG,)))
    return exit_code(rows), {(row.op, row.leg, row.output) for row in rows if row.verdict == FAIL}


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize("op", SMALL)
def test_without_a_fault_every_row_passes(op):
    rows = run_verify(Options(ops=(op,), legs=("cpu",)))
    assert {row.verdict for row in rows} == {PASS}
    outputs = {row.output for row in rows}
    assert outputs - {"value_2"} == {"value", *GRADIENTS.get(op, ())}
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize(("op", "output"), PLACES)
def test_fault_in_the_code_of_the_leg(op, output, monkeypatch):
    owner, name, index = PLACES[op, output]
    functions = vars(owner)
    assert failures(op) == (0, set())
    monkeypatch.setitem(functions, name, scaled(functions[name], index))
    configs.forget_plans()
    code, failed = failures(op)
    assert code == 1
    # The gradients of a norm's input and of its residual are one tensor, and one function computes the gradients of the
    # token and the positional embedding for packed texts.
    also = {("layer_norm", "d_x"): "d_residual", ("text_embed", "d_token_embedding"): "d_positional_embedding"}
    expected = {(op, LEG, name) for name in (output, also.get((op, output))) if name}
    assert failed == expected if output.startswith("d_") else failed >= expected


def test_faults_in_the_interpreted_kernels():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "test_fault_in_the_code"]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert f"{len(INTERPRETED)} passed" in run.stdout, run.stdout


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize(("op", "output"), [(op, name) for op in GRADIENTS for name in GRADIENTS[op]])
def test_fault_in_each_gradient(op, output, monkeypatch):
    for dtype in ("float32", "float16"):
        # In float16, PyTorch forms the logits of a loss in the dtype of the features, with an error above one percent.
        # Rounding to 8 bits has an error above one percent, too.
        factor = 1.25 if op == "fp8_linear" or (dtype == "float16" and op.endswith("_loss")) else FACTOR
        monkeypatch.setitem(specs(), op, gradient_off(SMALL[op], output.removeprefix("d_"), factor))
        assert failures(op, dtype) == (1, {(op, "cpu", output)})


@pytest.mark.usefixtures("small_cases")
def test_one_wrong_rank_fails(monkeypatch):
    right = SMALL["retrieval_ranks"]

    @functools.wraps(right.op)
    def wrong(**inputs):
        """Return retrieval ranks of which one is wrong, a fault that the verification must find."""
        image_ranks, text_ranks = right.op(**inputs)
        text_ranks[3] += 1
        return image_ranks, text_ranks

    monkeypatch.setitem(specs(), "retrieval_ranks", dataclasses.replace(right, op=wrong))
    assert failures("retrieval_ranks") == (1, {("retrieval_ranks", "cpu", "value_2")})


@pytest.mark.skipif(LEG != "cpu", reason="the fault is planted in the CPU path")
@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize(("output", "place"), [("value", 0), ("d_image", 1), ("d_logit_scale", 3)])
def test_fault_in_the_loss_of_a_small_batch(output, place, monkeypatch):
    right = small_batch._loss_and_gradients

    def wrong(*args):
        """Return the loss of a small batch with one wrong gradient, a fault that the verification must find."""
        found = right(*args)
        found[place].mul_(1.05)
        return found

    monkeypatch.setattr(small_batch, "MOST_LOGITS", MOST_LOGITS)
    assert failures("contrastive_loss") == (0, set())
    monkeypatch.setattr(small_batch, "_loss_and_gradients", wrong)
    assert failures("contrastive_loss") == (1, {("contrastive_loss", "cpu", output)})


@pytest.mark.usefixtures("small_cases")
@pytest.mark.parametrize("op", ["attention", "contrastive_loss"])
def test_other_bits_fail_the_repeats(op, monkeypatch):
    owner, name, _ = ON_CPU[op, "value"]
    right = vars(owner)[name]
    calls = []

    def wobbly(result):
        """Return results with other bits in every second call, a fault that the verification must find."""
        out, *rest = result
        calls.append(name)
        return torch.nextafter(out, out + 1) if len(calls) % 2 else out, *rest

    monkeypatch.setitem(vars(owner), name, changed(right, wobbly))
    rows = run_verify(Options(ops=(op,), dtypes=("float32",), legs=("cpu",)))
    (row,) = (row for row in rows if row.check == "determinism" and row.output == "value")
    assert row.verdict == FAIL
    assert "repeat 1 of 5 differs" in row.reason


@pytest.mark.usefixtures("small_cases")
def test_an_op_that_raises_is_a_row(monkeypatch):
    def broken(*args):
        """Fail as an op without its kernel does, while the op is verified."""
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(pool_cpu, "backward", broken)
    rows = run_verify(Options(ops=("attention_pool",), dtypes=("float32",), legs=("cpu",)))
    assert {row.verdict for row in rows} == {FAIL}
    assert all("RuntimeError: no such kernel" in row.reason for row in rows)


@pytest.mark.parametrize("peer", ["openclip", "hf"])
def test_one_wrong_weight_of_a_model(peer, monkeypatch):
    pytest.importorskip("open_clip" if peer == "openclip" else "transformers")
    rows = verify_model(peer, "ViT-T-8-32", "cpu", "float32", quick=True)
    assert len(rows) == 89
    assert {row.verdict for row in rows} == {PASS}
    right = models._OTHERS[peer]

    def wrong(model):
        """Return a model with one wrong weight, a fault that the verification must find."""
        other = right(model)
        with torch.no_grad():
            named = other.module.named_parameters()
            next(p for name, p in named if name.endswith("out_proj.weight"))[3, 5] *= 1.1
        return other

    monkeypatch.setitem(models._OTHERS, peer, wrong)
    rows = verify_model(peer, "ViT-T-8-32", "cpu", "float32", quick=True)
    failed = {row.output for row in rows if row.verdict == FAIL}
    assert failed & {"image_features", "text_features"}
    assert all(row.op == peer for row in rows)


def test_a_parameter_without_a_gradient_fails(monkeypatch):
    # A kernel that gives no gradient must not shorten the list of checks.
    right = kernels.attention

    def detached(qkv, *args, **kwargs):
        """Compute attention without the gradient of its input, a fault that the verification must find."""
        return right(qkv.detach(), *args, **kwargs) if kwargs["backend"] == "auto" else right(qkv, *args, **kwargs)

    monkeypatch.setattr("clipfast.models.layers.attention", detached)
    monkeypatch.setattr("clipfast.models.transformer.whole_blocks", lambda *_: {})  # so that blocks call their modules
    rows = verify_model("model", "ViT-T-8-32", "cpu", "float32", quick=True)
    wrong = {row.output: row.reason for row in rows if row.verdict == FAIL}
    assert wrong["d_transformer.resblocks.0.attn.in_proj_weight"] == "one side has no such output"


def test_wrong_gradients_bend_the_curve(monkeypatch):
    monkeypatch.setattr(curve, "STEPS", 8)
    (row,) = curve.verify_curve("cpu", "float32")
    assert row.verdict == PASS, row.reason
    assert [figure.kind for figure in row.figures] == ["max", "rms"]
    monkeypatch.setattr(attention_cpu, "backward_packed", scaled(attention_cpu.backward_packed, 0))
    configs.forget_plans()
    (row,) = curve.verify_curve("cpu", "float32")
    assert row.verdict == FAIL
    assert "allowed" in row.reason


def test_hugging_face_does_not_import_the_kernels_again():
    # The program runs in a checkout, whose folder "kernels" has the name of a package that transformers looks for.
    pytest.importorskip("transformers")
    code = """
import sys
from collections.abc import Iterator
from clipfast import create_model
from clipfast.verify.models import build_hugging_face
build_hugging_face(create_model("ViT-T-8-32"))
assert sys.modules.get("kernels") is None, sys.modules["kernels"]
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
