"""Test that each checker catches planted faults: the rule for errors, registration, gradients, poison, ttsem."""

import pytest
import torch
import triton
import triton.language as tl

from ..numerics import as_good_as_torch
from .conftest import needs_sanitizer, sanitizer_session


def test_constant_bias_fails():
    # The error of each value is within the largest error of PyTorch's result (the yardstick), but the root mean square
    # of the errors is too large.
    truth = torch.randn(10000, dtype=torch.float64)
    yardstick = truth.float()
    yardstick[0] += 1e-4
    with pytest.raises(AssertionError, match="rms error"):
        as_good_as_torch((truth + 5e-5).float(), yardstick, truth, 2.0, "x")


@triton.jit
def _column_sum_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """Add rows to one buffer with planted faults: programs race, and without the mask they write past its end."""
    offs = tl.arange(0, BLOCK)
    mask = offs < N if HAS_MASK else offs < BLOCK
    total = tl.load(out_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, total + tl.load(x_ptr + tl.program_id(0) * N + offs, mask=mask), mask=mask)


@needs_sanitizer
@pytest.mark.parametrize(
    ("rows", "has_mask", "fault"), [(2, True, "both touch"), (1, False, "past the end")], ids=["race", "bounds"]
)
def test_sanitizer_catches_a_planted_fault_and_leaves_no_gpu_behind(rows, has_mask, fault):
    sanitize = pytest.importorskip("ttsem.sanitize")
    x, out = torch.ones(rows, 10), torch.zeros(10)
    with sanitizer_session(), pytest.raises(sanitize.KernelFault, match=fault):
        _column_sum_kernel[(rows,)](x, out, 10, BLOCK=16, HAS_MASK=has_mask, enable_fp_fusion=True)
    assert not torch.cuda.is_available()
