"""LoRA by peft on patched models: it trains as on the original, merges, and goes over to a model without kernels."""

import copy

import pytest
import torch

import clipfast

from . import shrunk

TARGETS = {
    "ViT-B-32": ["c_fc", "c_proj", "attn"],
    "ViT-B-16-SigLIP": ["qkv", "proj", "fc1", "fc2"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_lora(name, tmp_path):
    peft = pytest.importorskip("peft")
    original = shrunk.open_clip_model(name).double().eval()
    args = shrunk.inputs(original)
    targets = TARGETS[name]
    if not any(isinstance(module, torch.nn.MultiheadAttention) for module in original.modules()):
        targets = [target.replace("attn", "out_proj") for target in targets]  # peft has no adapter for its own class
    config = peft.LoraConfig(r=2, target_modules=targets)

    def train(model):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, config)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            out = shrunk.outputs(adapted, *args)
            sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in out).backward()
            optimizer.step()
        return adapted

    theirs = train(copy.deepcopy(original))
    patched = clipfast.apply_to_open_clip(copy.deepcopy(original))
    ours = train(patched)
    assert "clipfast." in clipfast.report_kernels(ours)
    weights = peft.get_peft_model_state_dict(theirs)
    assert any(value.abs().max() > 1e-4 for key, value in weights.items() if "lora_B" in key)  # B begins as zeros
    torch.testing.assert_close(peft.get_peft_model_state_dict(ours), weights, rtol=1e-9, atol=1e-12)

    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    merged, expected = (model.merge_and_unload() for model in (ours, loaded))
    assert merged is patched
    # peft adds its weights to those of nn.MultiheadAttention and takes them away again, which rounds.
    torch.testing.assert_close(merged.state_dict(), expected.state_dict(), rtol=0, atol=1e-15)
    for got, want in zip(values(merged, args), values(expected, args), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def values(model, args):
    with torch.no_grad():
        out = model(*args)
    found = out.values() if isinstance(out, dict) else out
    return [value for value in found if isinstance(value, torch.Tensor)]
