"""timm's vision transformers, patched and unpatched, compute the same."""

import copy

import pytest
import torch

import clipfast

from . import shrunk

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
MODELS = {
    "vit_base_patch32_224": {},
    "vit_base_patch16_clip_224": {"img_size": 64},  # a norm before the blocks
    "vit_base_patch16_siglip_224": {"img_size": 64},  # attention pooling
    "vit_small_patch14_dinov2": {"img_size": 56},  # layer scale
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},  # registers
    "deit3_small_patch16_224": {"img_size": 64},  # positions without the class token
    "deit_small_distilled_patch16_224": {"img_size": 64},  # two tokens in front
    "vit_small_patch16_36x1_224": {"img_size": 64, "qk_norm": True},
    "vit_small_patch16_18x2_224": {"img_size": 64},  # parallel branches
    "vit_medium_patch16_gap_240": {"img_size": 64},  # no class token
    "vit_base_patch16_rope_224": {"img_size": 64},  # rotary positions
    "vit_base_patch16_xp_224": {"img_size": 64},  # parallel and fused
    "eva02_tiny_patch14_224": {"img_size": 56},  # SwiGLU and rotary positions
    "beit_base_patch16_224": {"img_size": 64},  # relative positions
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "num_classes": 5},
}


def build(name: str) -> torch.nn.Module:
    """A small model with weights that hide nothing, and something dropped."""
    import timm

    options = {} if "convnext" in name else {**SMALL, "drop_path_rate": 0.1}
    return shrunk.randomised(timm.create_model(name, **options | MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
def test_equal(name):
    model = build(name).double()
    patched = clipfast.apply_to_timm(copy.deepcopy(model))
    assert list(patched.state_dict()) == list(model.state_dict())
    args = shrunk.inputs(model)
    error, where = shrunk.largest_error(shrunk.results(patched, *args), shrunk.results(model, *args))
    assert error <= 1e-10, where
    args = tuple(x.float() for x in args)
    error, where = shrunk.largest_error(shrunk.results(patched.float(), *args), shrunk.results(model.float(), *args))
    assert error <= 1e-5, where


def test_gates_norms_and_a_mask():
    from timm.layers import Attention

    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": torch.nn.LayerNorm}
    model = shrunk.randomised(Attention(48, 2, **options)).double()
    patched = clipfast.apply_to_timm(copy.deepcopy(model))
    x, mask = torch.randn(2, 9, 48, dtype=torch.float64), torch.rand(9, 9) < 0.7
    mask.fill_diagonal_(True)
    for arguments in ({}, {"is_causal": True}, {"attn_mask": mask}):
        torch.testing.assert_close(patched(x, **arguments), model(x, **arguments), rtol=0, atol=1e-12)


def test_what_is_left_alone_says_why():
    report = clipfast.report(clipfast.apply_to_timm(build("beit_base_patch16_224")))
    assert "as before: Attention is not one of the attention classes that are known" in report
    import timm

    wide = timm.create_model("vit_base_patch32_224", depth=1, embed_dim=288, num_heads=2)
    assert "heads have 144 dimensions, and at most 128 can be computed" in clipfast.report(clipfast.apply_to_timm(wide))
