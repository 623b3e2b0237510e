"""Launch configurations: frozen dataclasses, looked up by kernel, architecture and operand.

Numbers are committed, not tuned at run time: an autotuner would make results depend on a race of timings, and cannot
run without a GPU. Every entry compiles for its architecture without a spill (tests/kernels/resources.json holds the
proof).
"""

import dataclasses
from typing import TypeVar

import torch


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile of a matrix product: output BLOCK_M x BLOCK_N, reduction in steps of BLOCK_K."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Tile of an attention kernel: BLOCK_M queries against BLOCK_N keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """Tile of a kernel that walks rows: BLOCK_M rows, BLOCK_K columns at a time."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int = 1


# Entries by kernel, bytes per element and architecture; an architecture takes the newest entry that is not newer than
# itself.
_GEMM = {
    ("contrastive_stats", 2, 80): GemmConfig(128, 128, 32, num_warps=8, num_stages=3),
    ("contrastive_stats", 2, 90): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("contrastive_stats", 4, 80): GemmConfig(64, 64, 32, num_warps=8, num_stages=2),
    ("contrastive_grad_tile", 2, 80): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("contrastive_grad_tile", 2, 100): GemmConfig(128, 64, 64, num_warps=8, num_stages=3),
    ("contrastive_grad_tile", 4, 80): GemmConfig(64, 64, 32, num_warps=8, num_stages=2),
    ("contrastive_product", 2, 80): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("contrastive_product", 2, 100): GemmConfig(128, 128, 32, num_warps=8, num_stages=3),
    ("contrastive_product", 4, 80): GemmConfig(64, 64, 32, num_warps=8, num_stages=2),
    ("patch_embed_fwd", 2, 80): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    # with BLOCK_K 64 a patch of 14 spills
    ("patch_embed_fwd", 2, 90): GemmConfig(128, 128, 32, num_warps=8, num_stages=3),
    ("patch_embed_fwd", 2, 100): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("patch_embed_fwd", 4, 80): GemmConfig(64, 64, 32, num_warps=8, num_stages=2),
    ("patch_embed_bwd_weight", 2, 80): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("patch_embed_bwd_weight", 4, 80): GemmConfig(64, 64, 16, num_warps=8, num_stages=1),
    ("patch_embed_bwd_images", 2, 80): GemmConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("patch_embed_bwd_images", 4, 80): GemmConfig(64, 64, 32, num_warps=8, num_stages=2),
}
_ROWS = {
    ("contrastive_finish", 2, 80): RowConfig(16, 128, num_warps=4),
    ("contrastive_finish", 4, 80): RowConfig(16, 128, num_warps=4),
}
_ATTENTION_64 = {  # head_dim up to 64
    ("attention_fwd", 2, 80): AttentionConfig(64, 32, num_warps=4, num_stages=2),
    ("attention_fwd", 2, 90): AttentionConfig(64, 64, num_warps=4, num_stages=2),
    ("attention_fwd", 2, 100): AttentionConfig(128, 64, num_warps=8, num_stages=2),
    ("attention_fwd", 4, 80): AttentionConfig(32, 32, num_warps=4, num_stages=2),
    ("attention_bwd_dq", 2, 80): AttentionConfig(64, 32, num_warps=4, num_stages=2),
    ("attention_bwd_dq", 2, 90): AttentionConfig(64, 64, num_warps=4, num_stages=2),
    ("attention_bwd_dq", 4, 80): AttentionConfig(32, 16, num_warps=8, num_stages=1),
    ("attention_bwd_dkv", 2, 80): AttentionConfig(32, 64, num_warps=4, num_stages=2),
    ("attention_bwd_dkv", 2, 90): AttentionConfig(64, 64, num_warps=4, num_stages=2),
    ("attention_bwd_dkv", 4, 80): AttentionConfig(32, 32, num_warps=8, num_stages=1),
}
_ATTENTION_128 = {  # head_dim up to 128
    ("attention_fwd", 2, 80): AttentionConfig(64, 32, num_warps=4, num_stages=2),
    ("attention_fwd", 2, 90): AttentionConfig(64, 64, num_warps=4, num_stages=2),
    ("attention_fwd", 4, 80): AttentionConfig(16, 16, num_warps=4, num_stages=1),
    ("attention_bwd_dq", 2, 80): AttentionConfig(64, 64, num_warps=8, num_stages=2),
    ("attention_bwd_dq", 2, 90): AttentionConfig(64, 64, num_warps=4, num_stages=2),
    ("attention_bwd_dq", 4, 80): AttentionConfig(16, 16, num_warps=8, num_stages=1),
    ("attention_bwd_dkv", 2, 80): AttentionConfig(64, 64, num_warps=8, num_stages=2),
    ("attention_bwd_dkv", 4, 80): AttentionConfig(16, 16, num_warps=4, num_stages=1),
}

C = TypeVar("C")


def gemm_config(kernel: str, arch: int, dtype: torch.dtype) -> GemmConfig:
    """Configuration of a matrix-product kernel for compute capability ``arch`` (90: sm_90) and ``dtype`` operands."""
    return _lookup(_GEMM, kernel, arch, dtype)


def row_config(kernel: str, arch: int, dtype: torch.dtype) -> RowConfig:
    """Configuration of a row-walking kernel for compute capability ``arch`` and operands of ``dtype``."""
    return _lookup(_ROWS, kernel, arch, dtype)


def attention_config(kernel: str, arch: int, dtype: torch.dtype, head_dim: int) -> AttentionConfig:
    """Configuration of an attention kernel for compute capability ``arch``, operands of ``dtype`` and ``head_dim``."""
    return _lookup(_ATTENTION_64 if head_dim <= 64 else _ATTENTION_128, kernel, arch, dtype)


def _lookup(table: dict[tuple[str, int, int], C], kernel: str, arch: int, dtype: torch.dtype) -> C:
    known = [entry_arch for name, size, entry_arch in table if name == kernel and size == dtype.itemsize]
    newest = max(entry_arch for entry_arch in known if entry_arch <= arch)
    return table[kernel, dtype.itemsize, newest]
