"""Freezes a tower except for its last layers, for OpenCLIP's ``lock_image_tower`` and ``lock_text_tower``."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .clip import CLIP

Group = list[nn.Module | nn.Parameter]


def freeze(groups: Sequence[Group], unlocked: int) -> None:
    """Freeze the parameters of all ``groups`` of a tower, except for the last ``unlocked`` groups.

    Raises:
        ValueError: ``unlocked`` is negative.
    """
    if unlocked < 0:
        raise ValueError(f"the number of groups that stay trainable must not be negative, got {unlocked}")
    for index, group in enumerate(groups):
        for parameter in parameters_of(group):
            parameter.requires_grad = index >= len(groups) - unlocked


class Lockable(nn.Module):
    """An image tower without BatchNorm, whose first groups of layers can be frozen."""

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:  # noqa: ARG002
        """Freeze the tower, except for its last groups of layers."""
        tower: Any = self
        freeze(tower.layer_groups(), unlocked_groups)


def parameters_of(group: Group) -> Iterator[nn.Parameter]:
    """Yield the parameters of a group of a tower's layers."""
    for part in group:
        yield from part.parameters() if isinstance(part, nn.Module) else [part]


def groups_of_text(model: "CLIP") -> list[Group]:
    """Return the groups of a text tower's layers, from input to output: embedding, blocks, and any projection."""
    tower = getattr(model, "text", model)  # SigLIP's text tower is the module ``text``, CLIP's is the model itself
    embedding: Group = [tower.token_embedding, tower.positional_embedding]
    head: list[Group] = [] if tower.text_projection is None else [[tower.text_projection]]
    return [embedding, *groups_of_blocks(tower.transformer.resblocks, tower.ln_final), *head]


def groups_of_blocks(blocks: nn.ModuleList, norm: nn.Module) -> list[Group]:
    """Return a group of layers for each block of a tower; the last group includes the norm after the blocks."""
    groups: list[Group] = [[block] for block in blocks]
    groups[-1].append(norm)
    return groups


def freeze_statistics(module: nn.Module, only: Sequence[object] | None = None) -> None:
    """Replace every BatchNorm in ``module`` by one that always uses its running statistics, and never updates them.

    Args:
        module: the module.
        only: the children of ``module`` to change; None for all.
    """
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if only is not None and not any(child is part for part in only):
            continue
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps).to(child.weight.device, child.weight.dtype)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_statistics(child)
