"""Text towers of OpenCLIP and transformers that pack texts compute the features and gradients of padded texts."""

import pytest
import torch
from torch import nn

import clipfast
from clipfast.models import packed_text

from . import hf_models, shrunk
from .pairs import TRAINING, assert_equal_results, call, error, lines, made, pair, patch
from .test_towers import configured

LENGTH, END = 77, shrunk.VOCABULARY - 2  # END is end-of-text's id; the vocabulary has a greater one
# The position of the end-of-text token in each text of a batch.
MIXES = {
    "random": torch.randint(0, LENGTH, (9,), generator=torch.Generator().manual_seed(3)).tolist(),
    "equal": [17] * 4,
    "first": [0] * 3,
    "one": [30],
    "empty captions": [1, 76, 1, 1],
}


def texts_of(ends, above=0):
    """Return token ids with the end-of-text token at ``ends``; at ``above`` may be a greater id than end-of-text's."""
    texts = torch.randint(1, END, (len(ends), LENGTH), generator=torch.Generator().manual_seed(1))
    texts[torch.arange(len(ends)), ends] = END
    if above:
        texts[:, above] = torch.where(texts[:, above] == END, END, END + 1)
    return texts


def of_texts(model, texts):
    """Return the features of texts, and the gradients of a weighted sum of the features, by name."""
    model.zero_grad()
    torch.manual_seed(1)  # seed dropout equally for both models
    features = model.encode_text(texts)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (features * weights.to(features.dtype)).sum().backward()
    return {"output": features.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("pool_type", ["argmax", "eos"])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_packing_changes_nothing(kind, pool_type, packed):
    model, patched = configured("text_cfg", kind, pool_type=pool_type, eos_id=END)
    for name, ends in MIXES.items():
        texts = texts_of(ends, above=3 if pool_type == "eos" else 0)
        assert error(of_texts(patched, texts), of_texts(model, texts)) <= 1e-12, name
    assert packed == [True] * len(MIXES)


@pytest.mark.parametrize("how", ["rounded", "no gradient", "norms", "activations", "LoRA", "all rows"])
def test_packing_changes_nothing_in_any_way_to_compute_a_block(how, packed, monkeypatch):
    model, patched = pair("ViT-B-32")
    texts = texts_of(MIXES["random"])
    if how == "rounded":  # round up the number of tokens, as on a GPU
        pack = packed_text._packed
        monkeypatch.setattr(packed_text, "_packed", lambda texts, lengths, _: pack(texts, lengths, True))
    elif how == "LoRA":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["c_fc", "c_proj"], init_lora_weights=False)
        for each in (model, patched):
            torch.manual_seed(3)
            peft.inject_adapter_in_model(config, each)
    elif how != "no gradient":
        rows = how != "all rows"
        patch(patched, norms=how == "norms", activations=how == "activations", text_embed=rows, pooled_last_block=rows)
    with torch.no_grad():
        torch.testing.assert_close(patched.encode_text(texts), model.encode_text(texts), rtol=0, atol=1e-12)
    if how != "no gradient":
        assert error(of_texts(patched, texts), of_texts(model, texts)) <= 1e-12
    assert packed
    assert all(packed)


def test_micro_batches_have_the_gradients_of_the_padded_batch(packed):
    model, patched = pair("ViT-B-32")
    texts = texts_of(MIXES["random"])
    images = shrunk.inputs(model, len(texts))[0]
    clipfast.contrastive_loss(*model(images, texts)).backward()
    clipfast.accumulate_gradients(patched, images, texts, 4)
    for ours, theirs in zip(patched.parameters(), model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-12 * theirs.grad.abs().max().clamp(min=1e-3)
    assert packed == 6 * [True]


def drop(model):
    """Give the attention of a block dropout, in OpenCLIP 3.3.0 and in later versions."""
    attn = model.transformer.resblocks[0].attn
    attn.dropout = 0.5
    getattr(attn, "attn_drop", nn.Dropout()).p = 0.5


# Changes to a text tower that forbid packing: hooks would see packed texts, or a layer could not compute them.
WATCHERS = {
    "a hook": lambda model: model.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda *_: None),
    "a hook on the stack": lambda model: model.transformer.register_forward_pre_hook(lambda *_: None),
    "a hook on the table": lambda model: model.token_embedding.register_forward_hook(lambda *_: None),
    "a hook on the norm": lambda model: model.ln_final.register_forward_hook(lambda *_: None),
    "a hook on all modules": lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "another module": lambda model: model.transformer.resblocks[0].register_module("ls_1", nn.BatchNorm1d(LENGTH)),
    "another forward": lambda model: setattr(model.transformer.resblocks[1].ln_1, "forward", lambda x: x + 1),
    "a compiled block": lambda model: model.transformer.resblocks[0].compile(backend="eager"),
    "another mask": lambda model: model.attn_mask.fill_(0),
    "dropout": drop,
}


@pytest.mark.parametrize("what", WATCHERS)
def test_a_watched_tower_gets_padded_texts(what, packed):
    model, patched = pair("ViT-B-32")
    texts = texts_of(MIXES["random"])
    patched.encode_text(texts)
    assert packed == [True]
    handles = [WATCHERS[what](each) for each in (model, patched)]
    try:
        assert error(of_texts(patched.double(), texts), of_texts(model.double(), texts)) <= 1e-11
        assert "as before" in lines(patched, "pack_text")[0]
    finally:
        for handle in handles:
            if isinstance(handle, torch.utils.hooks.RemovableHandle):
                handle.remove()
    assert packed == [True]


def test_texts_stay_padded_where_little_is_padding_or_a_compiler_sees_no_values(packed):
    patched = patch(made("ViT-B-32"))
    patched.encode_text(texts_of([76, 70, 76]))
    assert packed == [False]
    texts = texts_of(MIXES["random"])
    expected = patched.encode_text(texts)
    assert packed.pop()
    compiled = torch.compile(patched.encode_text, backend="eager", fullgraph=True)(texts)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-12)
    assert packed == [False]


def test_texts_may_be_packed_before(packed):
    model, patched = configured("text_cfg", pool_type="eos", eos_id=END)
    texts = texts_of(MIXES["random"], above=3)
    rows = (texts == END).int().argmax(-1)
    for each in (patched, patch(patched, pack_text=False)):
        found = each.encode_text(clipfast.pack_texts(texts, last=rows, for_gpu=True))
        torch.testing.assert_close(found, model.encode_text(texts), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="packed from 80 columns"):
        patched.encode_text(clipfast.pack_texts(torch.zeros(2, 80, dtype=torch.long)))
    with pytest.raises(TypeError, match="cannot compute packed texts: its attention is not ours"):
        patch(patched, attention=False).encode_text(clipfast.pack_texts(texts))
    assert packed == []


@pytest.mark.parametrize(("name", "reason"), [
    ("ViT-B-16-SigLIP", "every token sees the padding"), ("coca_ViT-B-32", "its mask hides padding too"),
    ("siglip", "every token sees the padding"), ("siglip2", "every token sees the padding"),
    ("CLIPTextModel", "every row is returned"), ("clip with dropout", "its attention is not ours, or drops weights"),
])  # fmt: skip
def test_the_report_says_why_texts_are_not_packed(name, reason, packed):
    _, patched = pair(name)
    call(patched)
    assert packed == []
    assert [f"as before: {reason}" in line for line in lines(patched, "pack_text")] == [True]


@pytest.mark.parametrize("name", ["clip", "clip of early configurations"])
@pytest.mark.parametrize("padding", [None, "nowhere", "end", "early", "middle"])
def test_transformers(name, padding, packed):
    model, patched = pair(name)
    given = hf_models.inputs(model, padding, batch=5)
    # One id is greater than end-of-text's. transformers pools at the greatest id only if eos_token_id is 2.
    given["input_ids"][2, 1] = hf_models.END + 1
    for checkpointing in (False, True):
        for each in (model, patched) if checkpointing else ():
            each.gradient_checkpointing_enable()
        ours, theirs = (hf_models.results(each, given, **TRAINING) for each in (patched, model))
        assert error(ours, theirs) <= 1e-12
    assert packed == ([True, True] if padding in (None, "nowhere", "end") else [])
    assert_equal_results(model.eval(), patched.eval(), given=given)  # in evaluation, no block computes one row only
    assert len(packed) <= 2


def test_texts_that_are_packed_up_to_another_token_are_refused():
    model, patched = configured("text_cfg", "CLIP", pool_type="eos", eos_id=END)
    texts = texts_of([9, 20, 30], above=3)
    with pytest.raises(ValueError, match=f"reads the token {END}, and texts were packed up to another one"):
        patched.encode_text(clipfast.pack_texts(texts))
    found = patched.encode_text(clipfast.pack_texts(texts, last=(texts == END).int().argmax(1)))
    torch.testing.assert_close(found, model.encode_text(texts))
