"""Adopted models with linear layers in FP8: they train like the originals, report the layers, and can be reverted."""

import copy
import pickle

import pytest
import torch

import clipfast
from clipfast.models import layers

from . import hf_models, shrunk
from .pairs import is_hf, lines, made, patch

# For each model, the linear layers of a block that are in FP8.
KINDS = {
    "ViT-B-32": ("attn", "mlp.c_fc", "mlp.c_proj"),
    "clip": (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc*"),
    "vit_base_patch16_siglip_224": ("attn.qkv", "attn.proj", "mlp.fc*"),
}


def losses(model, steps):
    """Train an adopted model for ``steps`` steps, each on other pairs, and return the losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    torch.manual_seed(5)
    given = hf_models.inputs(model, "end", 64) if is_hf(model) else shrunk.inputs(model, 64)
    found = []
    for _ in range(steps):
        if is_hf(model):
            given["pixel_values"] = torch.randn_like(given["pixel_values"])
            loss = model(**given, return_loss=True).loss
        else:
            images, *texts = given
            output = model(torch.randn_like(images), *texts)
            loss = clipfast.contrastive_loss(*output[:3]) if texts else output.logsumexp(-1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("place", ["as_on_a_gpu", "as_on_a_cpu"])
@pytest.mark.parametrize("recipe", ["switchback", "full"])
@pytest.mark.parametrize("name", KINDS)
def test_ten_steps_beside_the_original(name, recipe, place, request, monkeypatch):
    request.getfixturevalue(place)
    model = made(name, torch.float32)
    reverted = clipfast.revert_model(patch(copy.deepcopy(model), fp8=recipe, fp8_skip=(0, 0)))
    patched = patch(copy.deepcopy(model), fp8=recipe, fp8_skip=(0, 0))
    calls, function = [], layers.fp8_linear
    monkeypatch.setattr(layers, "fp8_linear", lambda *args, **kw: calls.append(kw["recipe"]) or function(*args, **kw))
    theirs = losses(copy.deepcopy(model), 10)
    assert losses(reverted, 2) == theirs[:2]
    assert not calls
    ours = losses(patched, 10)
    assert ours == pytest.approx(theirs, rel=0.01)
    assert set(calls) == {recipe}
    assert len(calls) >= 10 * len(lines(patched, "fp8"))
    said = "\n".join(lines(patched, "fp8"))
    for kind in KINDS[name]:
        assert f"{kind} " in said
    assert f"clipfast.fp8_linear, recipe {recipe}" in said


def test_skipped_blocks_copies_and_what_cannot_be():
    model = patch(made("ViT-B-32", torch.float32), fp8="full", fp8_skip=(1, 0))
    said = "\n".join(lines(model, "fp8"))
    assert "as before: 16 bits by fp8_skip" in said
    images, texts = shrunk.inputs(model)
    expected = model(images, texts)[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images, texts)[0], expected)
    assert not torch.equal(clipfast.revert_model(model)(images, texts)[0], expected)
    with pytest.raises(ValueError, match="fp8 must be"):
        patch(model, fp8="int8")
    for skip in (3, (1,), (1, 2.5), "ab"):
        with pytest.raises(ValueError, match="fp8_skip must be"):
            patch(model, fp8="full", fp8_skip=skip)
    apart = patch(model, fp8="full", attention=False)
    assert "its attention is not replaced" in "\n".join(lines(apart, "fp8"))


def test_adapters_keep_16_bits():
    peft = pytest.importorskip("peft")
    model = made("clip", torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    said = lines(patch(model, fp8="full"), "fp8")
    adapted = [line for line in said if "q_proj" in line]
    assert adapted
    assert all("as before: 16 bits, as an adapter wraps it" in line for line in adapted)
    assert any("v_proj" in line and "clipfast.fp8_linear" in line for line in said)
