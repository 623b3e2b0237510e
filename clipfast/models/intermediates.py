"""The outputs of single blocks, beside the features: OpenCLIP's ``forward_intermediates``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import take_rows
from .transformer import Transformer, plan, recomputed

if TYPE_CHECKING:
    from .clip import CLIP

Indices = int | Sequence[int] | None


def chosen(count: int, indices: Indices) -> list[int]:
    """Return which of ``count`` stages are meant.

    Args:
        count: how many stages there are.
        indices: the last so many if it is a number, those that are listed (negative ones from the end), all if None.

    Raises:
        ValueError: there are not as many.
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
    """Return the residual stream after the blocks, and after each chosen block: [B, N, width] all.

    Args:
        transformer: the stack of blocks.
        x: [B, N, width].
        indices: which blocks are chosen.
        stop_early: leave out the blocks after the last one that is chosen; the stream is the one there.
    """
    blocks: Any = transformer.resblocks
    taken = chosen(len(blocks), indices)
    steps = plan(transformer) if isinstance(transformer, Transformer) else None
    found: list[Tensor] = []
    for index, block in enumerate(blocks[: max(taken) + 1] if stop_early else blocks):
        x = recomputed(steps, block, x) if steps is not None and steps.recompute else block(x)
        if index in taken:
            found.append(x)
    return x, found


def check_format(output_fmt: str, known: tuple[str, ...]) -> None:
    """Refuse a format of the outputs that is not known."""
    if output_fmt not in known:
        raise ValueError(f"forward_intermediates: image_output_fmt must be {' or '.join(known)}, got {output_fmt!r}")


def text_intermediates(
    model: "CLIP", text: Tensor, *, indices: Indices, normalize_intermediates: bool, intermediates_only: bool
) -> dict[str, Any]:
    """Return the outputs of blocks of the text tower, and the features of the texts, of any length."""
    x, found = collect_blocks(model.transformer, model.embed_text(text), indices)
    if normalize_intermediates:
        found = [model.ln_final(stage) for stage in found]
    output: dict[str, Any] = {"text_intermediates": found}
    if not intermediates_only:
        output["text_features"] = model.ln_final(take_rows(x, text.argmax(-1))) @ model.text_projection
    return output


def add_logits(model: "CLIP", output: dict[str, Any], *, logits: bool, scale_and_bias: bool) -> None:
    """Add the logits of all pairs to ``output``, and the factor and the offset that make them."""
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
    """Divide the features of these names in ``output`` by their length."""
    for name in names:
        if name in output:
            output[name] = F.normalize(output[name], dim=-1)
