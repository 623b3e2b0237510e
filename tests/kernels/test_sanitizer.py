"""The kernels under ttsem, which executes Triton's own IR on the CPU: out-of-bounds accesses, races between programs,
and bfloat16.

The interpreter can do none of the three. ttsem takes over the launch, so it must not run with TRITON_INTERPRET=1.
"""

import contextlib
import functools
import sys

import pytest
import torch
import triton
import triton.language as tl

from clipfast import kernels
from clipfast.kernels import (
    attention,
    contrastive_loss,
    info_nce_loss,
    launch,
    nt_xent_loss,
    patch_embed,
    reference,
    retrieval_ranks,
    sigmoid_loss,
    text_embed,
)
from clipfast.kernels.attention import launches as attention_launches
from clipfast.kernels.configs import RowConfig, ShortConfig, config_key, override
from clipfast.kernels.contrastive import launches
from clipfast.kernels.launch import execute_on_cpu

from ..conftest import INTERPRET, ON_GPU
from ..numerics import compare, value_and_grads
from .cases import (
    ATTENTION_SIZES,
    attention_inputs,
    both,
    loss_inputs,
    norm_inputs,
    pair_inputs,
    patch_inputs,
    rank_inputs,
    text_inputs,
)

sanitize = pytest.importorskip(
    "ttsem.sanitize",
    reason="ttsem is not installed: 'make test' installs the pinned version; races and bf16 go UNCHECKED",
)
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
pytestmark = [
    pytest.mark.skipif(INTERPRET or ON_GPU, reason="ttsem replaces the launch on a CPU"),
    pytest.mark.skipif(TRITON < (3, 8), reason="ttsem knows Triton 3.8 and newer; races and bf16 go UNCHECKED"),
]

CPU = torch.device("cpu")
# Launches must stay small: above 4 million accesses ttsem no longer checks each for races.
DTYPES = [torch.bfloat16, torch.float32]
QUICK_SIZES = {(1, 64), (50, 8), (50, 88), (77, 64), (257, 64)}  # of attention


@contextlib.contextmanager
def session():
    """ttsem for sm_90; what it pretends of torch.cuda is taken back, since other tests share the process."""
    before = dict(vars(torch.cuda))
    try:
        with sanitize.session(cc=90) as running:
            yield running
    finally:
        for name, value in before.items():
            setattr(torch.cuda, name, value)


@pytest.fixture
def sanitizer():
    """Every launch executed and checked; a fault is raised out of it."""
    with session() as session_, execute_on_cpu():
        yield session_
        assert session_.launches > 0, "nothing was launched"
        assert session_.races_unchecked == 0, "a launch was too large for the race check: shrink the case"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [50.0, 1e4], ids=["shared", "online"])
@pytest.mark.parametrize("shape", [(1, 16), (67, 40)], ids=str)
def test_contrastive_loss(shape, scale, dtype, sanitizer, monkeypatch):
    monkeypatch.setattr(launches, "_block_edge", lambda x: 64)
    inputs = loss_inputs(shape, dtype, CPU, matched=0.3, scale=scale)
    op, expected = (functools.partial(fn, normalize=True) for fn in (contrastive_loss, reference.contrastive_loss))
    compare(op, expected, inputs, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [50.0, 1e4], ids=["shared", "online"])
def test_losses_of_several_blocks(scale, dtype, sanitizer, monkeypatch):
    monkeypatch.setattr(launches, "_block_edge", lambda x: 64)
    image, text, logit_scale = loss_inputs((67, 40), dtype, CPU, matched=0.3, scale=scale).values()
    queue = loss_inputs((70, 40), dtype, CPU, matched=0.3, scale=scale)["image"]
    queued = {"query": image, "key": text, "negatives": queue, "logit_scale": logit_scale}
    compare(info_nce_loss, reference.info_nce_loss, queued, torch.tensor(1.0))
    op, expected = (functools.partial(fn, in_batch=False) for fn in (info_nce_loss, reference.info_nce_loss))
    compare(op, expected, queued, torch.tensor(1.0))
    views = {"first": image, "second": text, "logit_scale": logit_scale}
    compare(nt_xent_loss, reference.nt_xent_loss, views, torch.tensor(1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 67], ids=["pairs", "no pairs"])
@pytest.mark.parametrize("shape", [(1, 16), (67, 40)], ids=str)
def test_sigmoid_loss(shape, offset, dtype, sanitizer, monkeypatch):
    monkeypatch.setattr(launches, "_block_edge", lambda x: 64)
    bias = {"logit_bias": torch.tensor(-10.0)}
    # one number's error can be nearly nothing by chance, PyTorch's too
    inputs = [loss_inputs(shape, dtype, CPU, matched=0.3, scale=20.0) | bias for _ in range(3)]
    op, expected = (functools.partial(fn, offset=offset) for fn in (sigmoid_loss, reference.sigmoid_loss))
    compare(op, expected, inputs, torch.tensor(1.0))


@pytest.mark.parametrize("scale", [50.0, 1e4], ids=["shared", "online"])
def test_contrastive_value_through_descriptors(scale, sanitizer, monkeypatch):
    # ttsem does not bring back what is stored through a descriptor, so gradients cannot be checked; the interpreter can
    monkeypatch.setattr(launch, "CPU_ARCH", 90)
    inputs = loss_inputs((67, 40), torch.bfloat16, CPU, matched=0.3, scale=scale)
    truth = reference.contrastive_loss(**{name: x.double() for name, x in inputs.items()})
    torch.testing.assert_close(contrastive_loss(**inputs).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", ["short", "looped"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("length", "head_dim"),
    [pytest.param(*size, marks=[] if size in QUICK_SIZES else pytest.mark.slow) for size in ATTENTION_SIZES],
)
def test_attention(length, head_dim, causal, kernels, sanitizer, monkeypatch):
    short = ShortConfig(32, 4, 1) if kernels == "short" and length <= 272 else None
    monkeypatch.setattr(attention_launches, "short_config", lambda *args: short)
    op, expected = (functools.partial(fn, num_heads=1, causal=causal) for fn in (attention, reference.attention))
    inputs, grad = attention_inputs((1, length, 1, head_dim, causal), torch.bfloat16, CPU)
    # the heads lie apart and the gradient is expanded: no layout is easy
    inputs["qkv"] = torch.cat([inputs["qkv"], inputs["qkv"]], -1)[..., : 3 * head_dim]
    compare(op, expected, inputs, grad[:, :, :1].expand(grad.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [True, False], ids=["bytes", "floats"])
@pytest.mark.parametrize(
    ("shape", "keep"), [((2, 28, 28, 14, 24), None), ((3, 16, 24, 8, 20), None), ((3, 16, 24, 8, 20), 4)], ids=str
)
def test_patch_embed(shape, keep, uint8, dtype, sanitizer):
    inputs, grad = patch_inputs(shape, dtype, CPU, uint8=uint8, keep=keep)
    compare(patch_embed, reference.patch_embed, inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (37, 77), (5, 1100)], ids=str)
def test_layer_norms(shape, dtype, sanitizer):
    inputs, grad = norm_inputs(shape, dtype, CPU, residual=True)
    ops = (functools.partial(_side_by_side, module.layer_norm) for module in (kernels, reference))
    compare(*ops, inputs, torch.cat([grad, grad.flip(0)], -1))
    inputs, grad = pair_inputs(shape, dtype, CPU)
    ops = (functools.partial(_side_by_side, module.layer_norm_pair) for module in (kernels, reference))
    compare(*ops, inputs, grad)


def _side_by_side(norm, **inputs):
    return both(inputs, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (67, 150, 24)], ids=str)
def test_retrieval_ranks(shape, dtype, sanitizer, monkeypatch):
    monkeypatch.setattr(sys.modules["clipfast.kernels.retrieval"], "SPAN", 128)  # two programs add to the same images
    inputs = rank_inputs(shape, dtype, CPU)
    for ours, expected in zip(retrieval_ranks(**inputs), reference.retrieval_ranks(**inputs), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (11, 7, 5, 40), (3, 9, 50, 24)], ids=str)
def test_text_embed(shape, dtype, sanitizer):
    inputs, grad = text_inputs(shape, dtype, CPU)
    with override(config_key("text_embed_bwd", dtype), RowConfig(4, 16, 1, 2)):
        compare(text_embed, reference.text_embed, inputs, grad)


def test_ids_that_are_no_rows_touch_nothing_outside(sanitizer):
    inputs, grad = text_inputs((5, 7, 9, 24), torch.float32, CPU)
    inputs["text"][::2, ::3] = torch.tensor([-1, 9, 2**31 - 1, -(2**31), 2**32, 2**40, -7, 10, 2**62]).view(3, 3)
    value_and_grads(text_embed, inputs, grad)


@triton.jit
def _column_sum_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """Planted faults: every program adds its row into one buffer; without the mask, past its end."""
    offs = tl.arange(0, BLOCK)
    mask = offs < N if HAS_MASK else offs < BLOCK
    total = tl.load(out_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, total + tl.load(x_ptr + tl.program_id(0) * N + offs, mask=mask), mask=mask)


@pytest.mark.parametrize(
    ("rows", "has_mask", "fault"), [(2, True, "both touch"), (1, False, "past the end")], ids=["race", "bounds"]
)
def test_planted_fault_is_caught(rows, has_mask, fault):
    x, out = torch.ones(rows, 10), torch.zeros(10)
    with session(), pytest.raises(sanitize.KernelFault, match=fault):
        _column_sum_kernel[(rows,)](x, out, 10, BLOCK=16, HAS_MASK=has_mask, enable_fp_fusion=True)


def test_other_tests_see_no_gpu():
    with session():
        pass
    assert not torch.cuda.is_available()
