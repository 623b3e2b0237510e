"""Model FLOPs, by formula from a configuration, and what they are held against: the F and the U of MFU.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, PaLM, appendix B) = model FLOPs of a step / (its seconds x peak
rate of the matrix units). Model FLOPs are those of the published architecture, whatever an implementation spares itself
or does twice: three times the forward pass (backward takes two products for each of its own), and 6 N^2 D for the loss
of N pairs (one product of the features forward, two backward). Every token counts in every layer, and so do all scores
of a causal one, though the last layer is read at one token. A multiply-add is two; only products and convolutions are
counted.
"""

from clipfast.kernels.hardware import card_named
from clipfast.models import CLIPConfig
from clipfast.models.config import VisionConfig

DEFINITION = "3 x forward of the published model + 6 N^2 D for the loss"


def step_flops(config: CLIPConfig, pairs: int) -> float:
    """Model FLOPs of a training step on ``pairs`` pairs."""
    return 3.0 * pairs * forward_flops(config) + 6.0 * pairs * pairs * config.embed_dim


def forward_flops(config: CLIPConfig) -> float:
    """Model FLOPs of one pair through both towers."""
    text, vision = config.text, config.vision
    if isinstance(vision.layers, int):
        image = _vision_transformer(vision, vision.layers, config.embed_dim)
    else:
        image = _resnet(vision, vision.layers, config.embed_dim)
    tower = _transformer(text.context_length, text.width, text.layers, text.mlp_ratio)
    return image + tower + 2.0 * text.width * config.embed_dim


def data_sheet_flops_per_s(gpu: str, dtype: str) -> float | None:
    """Dense peak of the card that names itself ``gpu``; None: not in the table."""
    card = card_named(gpu)
    return None if card is None else card.peak(half=dtype != "fp32")


def _transformer(tokens: int, width: int, layers: int, mlp_ratio: float) -> float:
    # 8 W^2 for the four projections, 16 W^2 for an MLP of ratio 4, and both products of attention
    projections = 8 * width**2 + 4 * width * int(width * mlp_ratio)
    return float(layers * tokens * (projections + 4 * tokens * width))


def _vision_transformer(vision: VisionConfig, layers: int, embed_dim: int) -> float:
    if vision.patch_size is None:
        raise ValueError(f"a vision transformer needs a patch_size, got {vision}")
    patches = (vision.image_size // vision.patch_size) ** 2
    patch_embedding = 2.0 * patches * 3 * vision.patch_size**2 * vision.width
    blocks = _transformer(1 + patches, vision.width, layers, vision.mlp_ratio)
    return patch_embedding + blocks + 2.0 * vision.width * embed_dim


def _resnet(vision: VisionConfig, layers: tuple[int, ...], embed_dim: int) -> float:
    """The stem halves the sides twice, each stage but the first halves them once, behind its first 3x3 convolution."""
    side, width = vision.image_size // 2, vision.width
    total = _conv(3, width // 2, 3, side) + _conv(width // 2, width // 2, 3, side) + _conv(width // 2, width, 3, side)
    side, channels = side // 2, width
    for stage, blocks in enumerate(layers):
        inner, out = width * 2**stage, 4 * width * 2**stage
        for block in range(blocks):
            total += _conv(channels, inner, 1, side) + _conv(inner, inner, 3, side)
            if stage > 0 and block == 0:
                side //= 2
            total += _conv(inner, out, 1, side) + (_conv(channels, out, 1, side) if block == 0 else 0.0)
            channels = out
    tokens = 1 + side**2
    pool = tokens * (6 * channels**2 + 4 * tokens * channels + 2 * channels * embed_dim)
    return total + pool


def _conv(channels: int, out: int, kernel: int, side: int) -> float:
    return 2.0 * channels * out * kernel**2 * side**2
