"""Test the tile arithmetic that kernels share in a small kernel of its own."""

import torch
import triton
import triton.language as tl

from clipfast.kernels.tiles import grouped_tile


@triton.jit
def _tiles_kernel(m_ptr, n_ptr, num_m, num_n, GROUP_M: tl.constexpr):
    """Store the tile that each program computes if tiles are taken in groups."""
    pid = tl.program_id(0)
    m, n = grouped_tile(pid, num_m, num_n, GROUP_M)
    tl.store(m_ptr + pid, m)
    tl.store(n_ptr + pid, n)


def test_every_tile_has_one_program(triton_device):
    # With 17 tiles of rows, the last group of 8 is short. With one tile of columns, a group is as small as it can be.
    for num_m, num_n in ((1, 8), (8, 1), (9, 3), (17, 8)):
        m, n = torch.full((2, num_m * num_n), -1, dtype=torch.int32, device=triton_device)
        _tiles_kernel[(num_m * num_n,)](m, n, num_m, num_n, GROUP_M=8)
        assert sorted(zip(m.tolist(), n.tolist(), strict=True)) == [(i, j) for i in range(num_m) for j in range(num_n)]
