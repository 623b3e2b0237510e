"""The tile arithmetic that kernels share, by itself."""

import pytest
import torch
import triton
import triton.language as tl

from clipfast.kernels.tiles import grouped_tile

from ..conftest import INTERPRET, ON_GPU

pytestmark = pytest.mark.skipif(not (INTERPRET or ON_GPU), reason="runs Triton kernels")


@triton.jit
def _tiles_kernel(m_ptr, n_ptr, num_m, num_n, GROUP_M: tl.constexpr):
    pid = tl.program_id(0)
    m, n = grouped_tile(pid, num_m, num_n, GROUP_M)
    tl.store(m_ptr + pid, m)
    tl.store(n_ptr + pid, n)


@pytest.mark.parametrize("num_n", [1, 3, 8])
@pytest.mark.parametrize("num_m", [1, 7, 8, 9, 17], ids=lambda m: f"{m} rows")
def test_every_tile_has_one_program(num_m, num_n, device):
    # 9 and 17 row tiles end in a short group; one column makes a group as small as it can be.
    m, n = (torch.full((num_m * num_n,), -1, dtype=torch.int32, device=device) for _ in range(2))
    _tiles_kernel[(num_m * num_n,)](m, n, num_m, num_n, GROUP_M=8)
    assert sorted(zip(m.tolist(), n.tolist(), strict=True)) == [(i, j) for i in range(num_m) for j in range(num_n)]
