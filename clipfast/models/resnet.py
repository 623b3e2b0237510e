"""CLIP's ResNets (Radford et al. 2021, section 2.4), with a stem of three convolutions, average pooling in place of
strides, and attention pooling at the end.

Parameters have their published names, which is why the children of ``downsample`` are "0" and "1".
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference import CLIP_MEAN, CLIP_STD, normalize_uint8
from .freezing import Group, freeze, freeze_statistics
from .intermediates import Indices, check_format, chosen
from .layers import single_query_attention
from .model_config import VisionConfig


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions; average pooling, in place of a stride, uses every pixel."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.downsample: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.downsample = nn.Sequential(OrderedDict([("0", projection), ("1", nn.BatchNorm2d(out_channels))]))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the residual block: [B, in_channels, H, W] -> [B, 4 channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self._pool(out)))
        shortcut = x if self.downsample is None else self.downsample(self._pool(x))
        return F.relu(out + shortcut)

    def _pool(self, x: Tensor) -> Tensor:
        """Average-pool the feature map of a ResNet block by the block's stride."""
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool2d(nn.Module):
    """Attention pooling of a ResNet's feature map; the one query of an image is the mean of its feature map."""

    def __init__(self, grid: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads, self.backend = heads, "auto"
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for layer in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Pool the grid of each image: [B, width, H, W] -> [B, embed_dim]."""
        x = x.flatten(2).transpose(1, 2)  # [B, HW, width]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        # Only the output of the first token, the mean, is used, and so attention has one query.
        q, weight_k, weight_v = (
            t.unflatten(dim, (self.num_heads, -1))
            for t, dim in ((self.q_proj(x[:, 0]), 1), (self.k_proj.weight, 0), (self.v_proj.weight, 0))
        )
        values = single_query_attention(q, x, weight_k, weight_v, None, self.backend) + self.v_proj.bias
        # The bias of the keys does not change the softmax. Its gradient is zero, and must not be None, because
        # DistributedDataParallel waits for it.
        return self.c_proj(values + 0 * self.k_proj.bias)


class ModifiedResNet(nn.Module):
    """The ResNet image tower; it normalises uint8 images, and expects floating images to be normalised already."""

    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    resize_mode = "shortest"

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        if isinstance(config.layers, int):
            raise ValueError(f"a ResNet needs four numbers of layers, got {config.layers}")
        width = config.width
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, config.layers[0], stride=1)
        self.layer2 = _stage(width * 4, width * 2, config.layers[1], stride=2)
        self.layer3 = _stage(width * 8, width * 4, config.layers[2], stride=2)
        self.layer4 = _stage(width * 16, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool2d(config.image_size // 32, width * 32, config.heads, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of images: [B, 3, H, W] -> [B, embed_dim]."""
        x = self.stem(images)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.attnpool(x)

    def stem(self, images: Tensor) -> Tensor:
        """Compute the first convolutions: [B, 3, H, W] -> [B, width, H / 4, W / 4]."""
        # Convolutions are faster in the channels-last layout, which every layer keeps.
        # Weights stay contiguous, since FSDP shards only contiguous parameters.
        images = images.contiguous(memory_format=torch.channels_last)
        if images.dtype == torch.uint8:
            images = normalize_uint8(images, self.image_mean, self.image_std, self.conv1.weight.dtype)
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,  # noqa: ARG002
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the outputs of the stem and the four stages, beside the features of the images.

        Args:
            x: images, [B, 3, H, W].
            indices: the outputs to return, among the five: a number n for the last n, a list of indices, or None for
                all.
            stop_early: with ``intermediates_only``, do not run the stages after the last one that is returned.
            normalize_intermediates, output_extra_tokens: have no meaning for a ResNet, as in OpenCLIP.
            intermediates_only: leave the features out.
            output_fmt: must be "NCHW".

        Returns:
            ``image_intermediates``, [B, C, h, w] each, and ``image_features`` [B, embed_dim].
        """
        check_format(output_fmt, ("NCHW",))
        stages = (self.stem, self.layer1, self.layer2, self.layer3, self.layer4)
        taken, found = chosen(len(stages), indices), []
        for index, stage in enumerate(stages[: max(taken) + 1] if stop_early and intermediates_only else stages):
            x = stage(x)
            if index in taken:
                found.append(x)
        return {"image_intermediates": found} | ({} if intermediates_only else {"image_features": self.attnpool(x)})

    def layer_groups(self) -> list[Group]:
        """Return the groups of the tower's layers, from input to output, for locking and layer-wise learning rates."""
        stem: Group = [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4], [self.attnpool]]

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower, except for its last groups of layers.

        With ``freeze_bn_stats``, BatchNorm in the frozen groups uses its running statistics, and never updates them.
        """
        groups = self.layer_groups()
        freeze(groups, unlocked_groups)
        if freeze_bn_stats:
            locked = groups[: max(0, len(groups) - unlocked_groups)]
            freeze_statistics(self, [part for group in locked for part in group])


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Return a stage of residual blocks of the ResNet."""
    out_channels = channels * Bottleneck.expansion
    stage = [Bottleneck(in_channels, channels, stride)] + [
        Bottleneck(out_channels, channels, 1) for _ in range(blocks - 1)
    ]
    for block in stage:
        # With a zero weight in its last norm, every residual block starts as its shortcut.
        nn.init.zeros_(block.bn3.weight)
    return nn.Sequential(*stage)
