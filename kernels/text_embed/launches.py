"""The launches of the text embedding's Triton kernels."""

import torch
from torch import Tensor

from ..common import as_rows, cdiv
from ..configs import row_config
from ..launch import arch_of, launch, programs_at_once
from .kernels import _segment_sums_kernel, _text_embed_fwd_kernel

FWD_REGISTERS = 64  # about as many as a thread of the forward kernel takes
CLEAR_ROWS = 16  # rows of the table that one program searches for among the ids; more rows take more registers
# The most rows and columns of a program that adds partial sums. They are small, since many short programs keep more
# multiprocessors busy for less time.
LATER_CHUNK, LATER_BLOCK_N = 64, 32


def forward(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the tokens [B, L, N] in ``dtype``, and the ids [B, L] in 32 bits, -1 for an id outside the table."""
    (batch, length), (vocab, width) = text.shape, token_embedding.shape
    out = token_embedding.new_empty(batch, length, width, dtype=dtype)
    ids = text.new_empty(batch, length, dtype=torch.int32)
    cfg = row_config("text_embed_fwd", arch_of(text.device), dtype)
    tiles = cdiv(length, cfg.block_m) * cdiv(width, cfg.block_n)
    at_once = programs_at_once(text.device, cfg.num_warps, FWD_REGISTERS)
    programs_per_tile = min(batch, max(1, at_once // max(1, tiles)))
    launch(
        _text_embed_fwd_kernel, (programs_per_tile * tiles,), text, token_embedding, positional_embedding, out, ids,
        batch, length, width, vocab, *text.stride(), *token_embedding.stride(), *positional_embedding.stride(),
        config=cfg, device=text.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    return out, ids


def backward_token(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the table of token embeddings, [V, N] in ``dtype``.

    Each launch sums the segments that end inside a chunk of rows, and leaves two partial sums of each chunk to the next
    launch, until one chunk is left. Programs of the first launch write zeros where the table has no token.
    """
    rows = as_rows(grad)
    ids, order = ids.reshape(-1).sort(stable=True)
    out = grad.new_empty(vocab, grad.shape[-1], dtype=dtype)
    cfg = row_config("text_embed_bwd", arch_of(grad.device), grad.dtype)
    rows_of_chunk = cfg.block_m  # the program walks these rows one by one
    block_n, is_first, is_last = cfg.block_n, True, False
    while not is_last:
        chunks = cdiv(len(ids), rows_of_chunk)
        is_last = chunks <= 1
        num_sums = chunks * cdiv(rows.shape[1], block_n)
        clearing = cdiv(vocab, CLEAR_ROWS) if is_first else 0
        sums = rows.new_empty(0 if is_last else 2 * chunks, rows.shape[1], dtype=torch.float32)
        sum_ids = ids.new_empty(len(sums))
        launch(
            _segment_sums_kernel, (num_sums + clearing,), rows, order if is_first else None, ids, out, sums, sum_ids,
            *rows.shape, vocab, num_sums, len(ids).bit_length(), *rows.stride(),
            config=cfg, device=grad.device, HAS_ORDER=is_first, IS_LAST=is_last,
            CHUNK=rows_of_chunk, BLOCK_N=block_n, NUM_STAGES=cfg.num_stages, CLEAR_ROWS=CLEAR_ROWS,
        )  # fmt: skip
        rows, ids, is_first = sums, sum_ids, False
        rows_of_chunk, block_n = min(rows_of_chunk, LATER_CHUNK), min(block_n, LATER_BLOCK_N)
    return out
