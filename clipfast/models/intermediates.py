"""The outputs of a tower's blocks in addition to the features, for OpenCLIP's ``forward_intermediates``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import take_rows
from .recomputation import recomputed
from .transformer import Transformer, plan

if TYPE_CHECKING:
    from .clip import CLIP

Indices = int | Sequence[int] | None


def chosen(count: int, indices: Indices) -> list[int]:
    """Return the indices of the blocks that the user selects among a tower's ``count`` blocks.

    Args:
        count: the number of blocks.
        indices: a number n for the last n, a list of indices (negative ones count from the end), or None for all.

    Raises:
        ValueError: an index or a number is out of range.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"forward_intermediates: there are {count} stages, so the last {indices} cannot be taken")
        return list(range(count - indices, count))
    wrong = [index for index in indices if not -count <= index < count]
    if wrong or not indices:
        raise ValueError(f"forward_intermediates: indices must be from {-count} to {count - 1}, got {list(indices)}")
    return [index % count for index in indices]


def collect_blocks(
    transformer: nn.Module, x: Tensor, indices: Indices, stop_early: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Run a tower's blocks; return the residual stream after them, and after each chosen block, all [B, N, width].

    Args:
        transformer: the stack of blocks.
        x: [B, N, width].
        indices: the indices of the chosen blocks.
        stop_early: end after the last chosen block, whose output is then the returned stream.
    """
    blocks: Any = transformer.resblocks
    taken = chosen(len(blocks), indices)
    steps = plan(transformer) if isinstance(transformer, Transformer) else None
    found: list[Tensor] = []
    for index, block in enumerate(blocks[: max(taken) + 1] if stop_early else blocks):
        x = recomputed(steps.recompute, block, x) if steps is not None and steps.recompute else block(x)
        if index in taken:
            found.append(x)
    return x, found


def check_format(output_fmt: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown output format of ``forward_intermediates``."""
    if output_fmt not in known:
        raise ValueError(f"forward_intermediates: image_output_fmt must be {' or '.join(known)}, got {output_fmt!r}")


def text_intermediates(
    model: "CLIP", text: Tensor, *, indices: Indices, normalize_intermediates: bool, intermediates_only: bool
) -> dict[str, Any]:
    """Run the text tower; return the outputs of the chosen blocks, and the features of the texts, not normalised."""
    if not isinstance(text, Tensor):
        raise TypeError(f"forward_intermediates: text must be a tensor of token ids, got a {type(text).__name__}")
    x, found = collect_blocks(model.transformer, model.embed_text(text), indices)
    if normalize_intermediates:
        found = [model.ln_final(stage) for stage in found]
    output: dict[str, Any] = {"text_intermediates": found}
    if not intermediates_only:
        output["text_features"] = model.ln_final(take_rows(x, text.argmax(-1))) @ model.text_projection
    return output


def add_logits(model: "CLIP", output: dict[str, Any], *, logits: bool, scale_and_bias: bool) -> None:
    """Add the logits of all pairs, and their scale and bias, to the ``output`` of ``forward_intermediates``."""
    scale, bias = model.logit_scale.exp(), model.logit_bias
    if logits:
        output["image_logits"] = pair_logits(output["image_features"], output["text_features"], scale, bias)
        output["text_logits"] = output["image_logits"].T
    if scale_and_bias:
        output["logit_scale"] = scale
        if bias is not None:
            output["logit_bias"] = bias


def pair_logits(image_features: Tensor, text_features: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits [B, T] of all pairs of images [B, E] and texts [T, E] of unit length."""
    logits = scale * image_features @ text_features.T
    return logits if bias is None else logits + bias


def normalized(output: dict[str, Any], *names: str) -> None:
    """Scale the features with these names in the ``output`` of ``forward_intermediates`` to unit length."""
    for name in names:
        if name in output:
            output[name] = F.normalize(output[name], dim=-1)
