"""timm's vision transformers compute the same before and after they are patched."""

import copy

import pytest
import torch

import clipfast

from . import shrunk
from .pairs import assert_equal, pair


@pytest.mark.parametrize("name", shrunk.TIMM_MODELS)
def test_equal(name):
    model, patched = pair(name)
    assert list(patched.state_dict()) == list(model.state_dict())
    assert_equal(model, patched)
    assert_equal(model.float(), patched.float(), 1e-5)


def test_gates_norms_and_a_mask():
    from timm.layers import Attention

    options = {"qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "norm_layer": torch.nn.LayerNorm}
    model = shrunk.randomised(Attention(48, 2, **options)).double()
    patched = clipfast.apply_to_timm(copy.deepcopy(model))
    x, mask = torch.randn(2, 9, 48, dtype=torch.float64), torch.rand(9, 9) < 0.7
    mask.fill_diagonal_(True)
    for arguments in ({}, {"is_causal": True}, {"attn_mask": mask}):
        torch.testing.assert_close(patched(x, **arguments), model(x, **arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_base_patch32_224", "vit_base_patch16_siglip_224", "vit_base_patch16_rope_224"])
def test_fx_records_the_original(name):
    model = shrunk.timm_model(name).eval()
    (x,) = shrunk.inputs(model)
    graph = torch.fx.symbolic_trace(clipfast.apply_to_timm(copy.deepcopy(model)))
    assert torch.equal(graph(x), torch.fx.symbolic_trace(model)(x))


def test_what_is_left_alone_says_why():
    report = clipfast.report_kernels(clipfast.apply_to_timm(shrunk.timm_model("beit_base_patch16_224")))
    assert "as before: Attention is not one of the attention classes that are known" in report
    import timm

    wide = timm.create_model("vit_base_patch32_224", depth=1, embed_dim=288, num_heads=2)
    assert "heads have 144 dimensions, and at most 128 can be computed" in clipfast.report_kernels(
        clipfast.apply_to_timm(wide)
    )


@pytest.mark.parametrize("separate", [False, True])
def test_a_hook_on_a_projection_with_biases_of_its_own(separate):
    from timm.models.eva import EvaAttention

    attn = shrunk.randomised(EvaAttention(48, 2, qkv_bias_separate=separate, scale_norm=False)).double()
    patched = clipfast.apply_to_timm(copy.deepcopy(attn))
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(patched(x), attn(x), rtol=0, atol=1e-12)
    for each in (attn, patched):  # without separate biases, timm only reads the weight of qkv
        each.qkv.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(patched(x), attn(x), rtol=0, atol=1e-12)
