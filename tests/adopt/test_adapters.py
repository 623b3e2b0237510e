"""LoRA adapters of peft on patched models: they train as on the original, merge, and load into an original model."""

import copy

import pytest
import torch
from torch import nn

import clipfast

from . import hf_models
from .pairs import TRAINING, assert_equal, call, is_hf, pair, results

TARGETS = {
    "ViT-B-32": ["c_fc", "c_proj", "attn"],
    "ViT-B-16-SigLIP": ["qkv", "proj", "fc1", "fc2"],
    "clip": ["q_proj", "v_proj", "fc1", "out_proj", "visual_projection"],
    "siglip": ["k_proj", "v_proj", "fc2"],
    # Not the head's out_proj: PyTorch's MultiheadAttention reads its weight, and would never call an adapter of it.
    "siglip2": r".*(q_proj|self_attn\.out_proj|fc1)",
}


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the outputs of a patched model of transformers or OpenCLIP by name."""
    return hf_models.flat(call(model.eval()))


@pytest.mark.parametrize("name", TARGETS)
def test_lora(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, patched = pair(name)
    targets = TARGETS[name]
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()) and not is_hf(model):
        # Peft has an adapter for PyTorch's attention, and none for the attention class of later versions of OpenCLIP.
        targets = [target.replace("attn", "out_proj") for target in targets]
    adapted = []
    for each in (copy.deepcopy(model), patched):
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(each, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)))
        optimizer = torch.optim.AdamW((p for p in adapted[-1].parameters() if p.requires_grad), lr=1e-3)
        for _ in range(2):
            results(adapted[-1].get_base_model(), **TRAINING)
            optimizer.step()
    theirs, ours = adapted
    assert_equal(theirs.get_base_model(), ours.get_base_model())
    assert "clipfast." in clipfast.report_kernels(ours)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    expected, merged = outputs(theirs.get_base_model()), ours.merge_and_unload()
    assert merged is patched
    for each in (loaded.get_base_model(), clipfast.revert_model(copy.deepcopy(merged)), merged):
        torch.testing.assert_close(outputs(each), expected, rtol=1e-9, atol=1e-9)
