"""Computes only the row of the last block that a tower of OpenCLIP or transformers uses, such as the class token's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..models.layers import take_rows
from ..models.packed_text import PackedText
from .parts import add_norm
from .places import is_untouched

KIND = "pooled_last_block"
ROW = "one row, by clipfast.attention_pool"


def why_not_row(block: Any, num_tokens: int, num_heads: int, is_known: Callable[[Any], bool]) -> str:
    """Return the reason why an adopted model's last block cannot compute a single row, or "" if it can.

    Args:
        block: the block.
        num_tokens: the number of tokens of a sequence.
        num_heads: the number of attention heads.
        is_known: returns True for a module that computes each row independently, and for known attention.
    """
    if not all(is_known(part) for part in block.modules()):
        return "its last block has parts that CLIP's has not, such as an adapter"
    if not all(is_untouched(part) for part in block.modules()):
        return "its last block has a hook, or something else has replaced a part of it"
    if num_tokens > MAX_TOKENS or num_heads > MAX_HEADS:
        return f"more than {MAX_TOKENS} tokens or {MAX_HEADS} heads"
    return ""


def last_row(
    x: Tensor, rows: Tensor | PackedText | None, branch: Tensor, norm: Any, mlp: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute row ``rows[b]`` of each sequence after an adopted model's block, from its attention: -> [B, width].

    Args:
        x: the input of the block.
        rows: [B]; None for the first row of each sequence; packed texts for the last row of each.
        branch: [B, width], the output of the block's attention for these rows.
        norm: the block's second norm.
        mlp: the block's MLP.
    """
    x, normed = add_norm(take_rows(x, rows), branch, norm)
    return x + mlp(normed)
