"""The sanitizer itself: it finds the faults that it exists for, and leaves nothing behind.

``test_cases.py`` runs the kernels under it. The interpreter finds neither out-of-bounds accesses nor races between
programs, and cannot multiply bfloat16.
"""

import pytest
import torch
import triton
import triton.language as tl

from .conftest import needs_sanitizer, sanitizer_session

pytestmark = needs_sanitizer


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
    sanitize = pytest.importorskip("ttsem.sanitize")
    x, out = torch.ones(rows, 10), torch.zeros(10)
    with sanitizer_session(), pytest.raises(sanitize.KernelFault, match=fault):
        _column_sum_kernel[(rows,)](x, out, 10, BLOCK=16, HAS_MASK=has_mask, enable_fp_fusion=True)


def test_other_tests_see_no_gpu():
    with sanitizer_session():
        pass
    assert not torch.cuda.is_available()
