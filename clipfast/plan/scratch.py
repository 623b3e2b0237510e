"""What the blocks of the loss hold for a while on either device, in bytes, by the sizes that the code itself takes."""

import dataclasses
from typing import Protocol

import torch

from ..kernels.contrastive import cpu_blocks as cpu
from ..kernels.contrastive.features import PAIR_ROWS

FLOAT = 4  # bytes of the float32 that is accumulated in


@dataclasses.dataclass(frozen=True)
class Operand:
    """Bytes of rows as the products take them, beyond the rows that were there: kept, and while they are made."""

    kept: int = 0
    making: int = 0


class Scratch(Protocol):
    """Of blocks of M rows and N columns; all in bytes, unless said otherwise."""

    @property
    def packed_row(self) -> int:
        """Of a row as it is sent, where that is kept beside what was prepared."""

    @property
    def widened_rows(self) -> int:
        """Rows (no bytes) of pairs that are multiplied at once for the gradient of the scale."""

    def operand(self, rows: int) -> Operand:
        """Rows prepared for products."""

    def strip(self, rows: int) -> int:
        """Rows (no bytes) that are accumulated before they are finished."""

    def stats(self, m: int, n: int) -> int:
        """Statistics, the vectors that they return left out."""

    def gradients(self, m: int, n: int) -> int:
        """G times features, the sums that they are added to left out."""

    def finish(self, rows: int) -> int:
        """The end of the gradients, these left out."""


@dataclasses.dataclass(frozen=True)
class CpuScratch:
    """On a CPU: operands are float32, logits come in chunks of rows."""

    embed_dim: int
    dtype: torch.dtype
    widened_rows: int = 0  # G is not rounded, so the gradient of the scale needs none

    @property
    def packed_row(self) -> int:
        """16-bit rows are made again from their float32 copies."""
        return 0 if self.dtype.itemsize == FLOAT else self.embed_dim * self.dtype.itemsize

    def operand(self, rows: int) -> Operand:
        """Of 16-bit features a float32 copy, and twice on the way to it another."""
        if self.dtype.itemsize == FLOAT:
            return Operand()
        elements = rows * self.embed_dim
        return Operand(elements * FLOAT, elements * (2 * FLOAT + self.dtype.itemsize))

    def strip(self, rows: int) -> int:
        """All of them."""
        return rows

    def stats(self, m: int, n: int) -> int:
        """A chunk of logits; and a chunk of scaled features, or the sums of its columns."""
        chunk = cpu.chunk_rows(m, n)
        return FLOAT * (chunk * n + max(chunk * self.embed_dim, n))

    def gradients(self, m: int, n: int) -> int:
        """A chunk of logits, one of scaled features, a piece in the cache, and maxima without infinities."""
        chunk = cpu.chunk_rows(m, n)
        return FLOAT * (chunk * n + chunk * self.embed_dim + max(cpu.PIECE_ELEMENTS, n) + m + n)

    def finish(self, rows: int) -> int:
        """The product of each gradient and feature, before it is summed."""
        return FLOAT * rows * self.embed_dim


@dataclasses.dataclass(frozen=True)
class GpuScratch:
    """On a GPU of compute capability ``arch``: the kernels take features as they are where rows are aligned."""

    embed_dim: int
    dtype: torch.dtype
    arch: int
    multiprocessors: int
    packed_row: int = 0  # what was prepared is sent, or a copy that is then let go

    @property
    def widened_rows(self) -> int:
        """Of float32 features G is not rounded, so the gradient of the scale needs none."""
        return 0 if self.dtype.itemsize == FLOAT else PAIR_ROWS

    def operand(self, rows: int) -> Operand:
        """A copy with aligned rows where they are not."""
        copied = 0 if self._is_aligned else rows * self._aligned(self.embed_dim) * self.dtype.itemsize
        return Operand(copied, copied)

    def strip(self, rows: int) -> int:
        """As many as a block of G has."""
        return min(rows, self._edge)

    def stats(self, m: int, n: int) -> int:
        """Sums and maxima by tile."""
        from ..kernels.contrastive.triton_blocks import stats_scratch

        return stats_scratch(self.arch, self.dtype, m, n)

    def gradients(self, m: int, n: int) -> int:
        """A block of G."""
        return min(m, self._edge) * self._aligned(min(n, self._edge)) * self.dtype.itemsize

    def finish(self, rows: int) -> int:
        """A vector."""
        return FLOAT * rows

    @property
    def _edge(self) -> int:
        from ..kernels.contrastive.triton_blocks import block_edge

        return block_edge(self.arch, self.dtype, self.embed_dim, self.multiprocessors)

    @property
    def _is_aligned(self) -> bool:
        return self._aligned(self.embed_dim) == self.embed_dim

    def _aligned(self, columns: int) -> int:
        multiple = 16 // self.dtype.itemsize
        return -(-columns // multiple) * multiple
