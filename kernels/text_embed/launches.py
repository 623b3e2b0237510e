"""The launches of the text embedding's Triton kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common import as_rows, cdiv, new_tensors, num_rows, row_strides
from ..configs import row_config
from ..launch import arch_of, launch, plan_start, programs_at_once
from .kernels import _segment_sums_kernel, _text_embed_fwd_kernel, _text_embed_packed_kernel

FWD_REGISTERS = 64  # about as many as a thread of the forward kernel takes
CLEAR_ROWS = 16  # rows of the table that one program searches for among the ids; more rows take more registers
# The most rows and columns of a program that adds partial sums. They are small, since many short programs use more
# multiprocessors and finish sooner.
LATER_CHUNK, LATER_BLOCK_N = 64, 32


def forward(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan the launch that embeds texts with the memory layout of ``text``.

    Returns:
        The function that computes the tokens [B, L, N] in ``dtype``, and the ids [B, L] in 32 bits, -1 for an id
        outside the table.
    """
    (batch, length), (vocab, width) = text.shape, token_embedding.shape
    cfg = row_config("text_embed_fwd", arch_of(text.device), dtype)
    tiles = cdiv(length, cfg.block_m) * cdiv(width, cfg.block_n)
    at_once = programs_at_once(text.device, cfg.num_warps, FWD_REGISTERS)
    programs_per_tile = min(batch, max(1, at_once // max(1, tiles)))
    start = plan_start(
        _text_embed_fwd_kernel, (programs_per_tile * tiles,),
        batch, length, width, vocab, *text.stride(), *token_embedding.stride(), *positional_embedding.stride(),
        config=cfg, device=text.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n, NUM_STAGES=cfg.num_stages,
    )  # fmt: skip
    new_out, new_ids = new_tensors(text, (batch, length, width), dtype), new_tensors(text, dtype=torch.int32)

    def compute(
        text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, _: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """Embed texts by the kernel, for tensors of the planned layout."""
        out, ids = new_out(), new_ids()
        start(text, token_embedding, positional_embedding, out, ids)
        return out, ids

    return compute


def forward_packed(
    text: Tensor, token_embedding: Tensor, positional_embedding: Tensor, bounds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the tokens [T, N] of packed texts in ``dtype``, and their ids and positions as int32 [2, T].

    -1 stands for an id outside the table, and for both id and position of a token that belongs to no text.
    """
    (vocab, width), total = token_embedding.shape, len(text)
    out = token_embedding.new_empty(total, width, dtype=dtype)
    ids = bounds.new_empty(bounds.shape)
    cfg = row_config("text_embed_packed", arch_of(text.device), dtype)
    launch(
        _text_embed_packed_kernel, (cdiv(total, cfg.block_m) * cdiv(width, cfg.block_n),),
        text, bounds, token_embedding, positional_embedding, out, ids,
        total, len(positional_embedding), width, vocab,
        *text.stride(), *token_embedding.stride(), *positional_embedding.stride(),
        config=cfg, device=text.device, BLOCK_M=cfg.block_m, BLOCK_N=cfg.block_n,
    )  # fmt: skip
    return out, ids


def backward_token(grad: Tensor, ids: Tensor, vocab: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Plan the gradient of the table of token embeddings.

    Each launch sums the segments (rows of equal ids) that end inside a chunk of rows, and leaves two partial sums of
    each chunk to the next launch, until one chunk is left. Further programs of the first launch write zeros to the rows
    of the gradient that no id selects.

    Returns:
        The function that computes the gradient, [V, N] in ``dtype``.
    """
    cfg = row_config("text_embed_bwd", arch_of(grad.device), grad.dtype)
    rows_of_chunk = cfg.block_m  # a program adds up these rows one by one
    block_n, is_first, is_last = cfg.block_n, True, False
    rows_left, width, strides = num_rows(grad), grad.shape[-1], row_strides(grad)[0]
    steps = []
    while not is_last:
        chunks = cdiv(rows_left, rows_of_chunk)
        is_last = chunks <= 1
        num_sums = chunks * cdiv(width, block_n)
        clearing = cdiv(vocab, CLEAR_ROWS) if is_first else 0
        start = plan_start(
            _segment_sums_kernel, (num_sums + clearing,),
            rows_left, width, vocab, num_sums, rows_left.bit_length(), *strides,
            config=cfg, device=grad.device, HAS_ORDER=is_first, IS_LAST=is_last,
            CHUNK=rows_of_chunk, BLOCK_N=block_n, NUM_STAGES=cfg.num_stages, CLEAR_ROWS=CLEAR_ROWS,
        )  # fmt: skip
        rows_left, strides = 0 if is_last else 2 * chunks, (width, 1)
        steps.append(
            (start, new_tensors(grad, (rows_left, width), torch.float32), new_tensors(grad, (rows_left,), ids.dtype))
        )
        rows_of_chunk, block_n, is_first = min(rows_of_chunk, LATER_CHUNK), min(block_n, LATER_BLOCK_N), False
    new_out = new_tensors(grad, (vocab, width), dtype)

    def compute(grad: Tensor, ids: Tensor, _: int, dtype: torch.dtype) -> Tensor:
        """Compute the gradient of the table of token embeddings, for tensors of the planned layout."""
        order: Tensor | None
        ids, order = ids.reshape(-1).sort(stable=True)
        rows, out = as_rows(grad), new_out()
        for start, new_sums, new_sum_ids in steps:
            sums, sum_ids = new_sums(), new_sum_ids()
            start(rows, order, ids, out, sums, sum_ids)
            rows, ids, order = sums, sum_ids, None
        result: Tensor = out
        return result

    return compute
