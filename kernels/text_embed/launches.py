"""The launches of the text embedding's Triton kernels."""

import torch
import triton
from torch import Tensor

from ..common import as_rows
from ..configs import row_config
from ..launch import arch_of, launch, programs_at_once
from .kernels import _segment_sums_kernel, _text_embed_fwd_kernel

FWD_REGISTERS = 64  # about as many as a thread of the forward kernel takes


def forward(text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tokens [B, L, N] in ``dtype``."""
    (batch, length), (vocab, width) = text.shape, token_embedding.shape
    out = token_embedding.new_empty(batch, length, width, dtype=dtype)
    cfg = row_config("text_embed_fwd", arch_of(text.device), dtype)
    tiles = triton.cdiv(length, cfg.block_m) * triton.cdiv(width, cfg.block_n)
    at_once = programs_at_once(text.device, cfg.num_warps, FWD_REGISTERS)
    programs_per_tile = min(batch, max(1, at_once // max(1, tiles)))
    launch(
        _text_embed_fwd_kernel, (programs_per_tile * tiles,), text, token_embedding, positional_embedding, out,
        batch, length, width, vocab, *text.stride(), *token_embedding.stride(), *positional_embedding.stride(),
        config=cfg, device=text.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    return out


def backward_token(grad: Tensor, text: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table, [V, N] in ``dtype``.

    Each launch sums the segments that end inside a chunk of rows, and leaves two partial sums of each chunk to the next
    launch, until one chunk is left.
    """
    rows, ids = as_rows(grad), text.reshape(-1)
    ids, order = torch.where((ids >= 0) & (ids < vocab), ids, -1).to(torch.int32).sort(stable=True)
    out = grad.new_zeros(vocab, grad.shape[-1], dtype=dtype)
    cfg = row_config("text_embed_bwd", arch_of(grad.device), grad.dtype)
    rows_of_chunk = cfg.block_m  # a program walks the rows one by one, and so its tile has as many as a chunk
    num_n = triton.cdiv(rows.shape[1], cfg.block_n)
    has_order, is_last = True, False
    while not is_last:
        chunks = triton.cdiv(len(ids), rows_of_chunk)
        is_last = chunks <= 1
        sums = rows.new_empty(0 if is_last else 2 * chunks, rows.shape[1], dtype=torch.float32)
        sum_ids = ids.new_empty(len(sums))
        launch(
            _segment_sums_kernel, (chunks * num_n,), rows, order if has_order else None, ids, out, sums, sum_ids,
            *rows.shape, *rows.stride(),
            config=cfg, device=grad.device, HAS_ORDER=has_order, IS_LAST=is_last,
            CHUNK=rows_of_chunk, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
        )  # fmt: skip
        rows, ids, has_order = sums, sum_ids, False
    return out
