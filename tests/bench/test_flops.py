"""Model FLOPs against what PyTorch counts in OpenCLIP's model, and what a card promises."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipfast import get_model_config
from clipfast.bench.flops import data_sheet_flops_per_s, forward_flops, step_floor_flops, step_flops


@pytest.mark.parametrize("name", ["ViT-T-8-32", "ViT-B-16", "ViT-g-14", "RN50", "RN50x4"])
def test_count_agrees_with_what_open_clip_computes(name):
    open_clip = pytest.importorskip("open_clip")
    config = get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config.to_dict())
        size = config.vision.image_size
        image, text = torch.empty(1, 3, size, size), torch.empty(1, config.text.context_length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(image)
        model.encode_text(text)
    assert forward_flops(name) == (pytest.approx(counter.get_total_flops(), rel=0.001), config.embed_dim)


def test_a_step_is_three_forwards_and_the_loss():
    # 14.8 GFLOP for a pair, as OpenCLIP's own table of models has it
    flops, _ = forward_flops("ViT-B-32")
    assert flops == pytest.approx(14.78e9, rel=0.001)
    assert step_flops("ViT-B-32", 8) == 24 * flops + 6 * 64 * 512
    assert step_floor_flops("ViT-B-32", 8) == 24 * flops + 8 * 64 * 512
    # one query pools a ResNet's positions here
    assert forward_flops("RN50", published=False)[0] < 0.95 * forward_flops("RN50")[0]


@pytest.mark.parametrize(
    ("gpu", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312e12),
        ("NVIDIA H100 PCIe", "bf16", None),  # slower, and not in the table
        ("NVIDIA GeForce RTX 4090", "bf16", None),
    ],
)
def test_data_sheet(gpu, dtype, peak):
    assert data_sheet_flops_per_s(gpu, dtype) == peak
