"""Patched models of transformers: settings, hooks and subclasses that they keep, and how they are reverted."""

import re

import pytest
import torch
from torch import nn

import clipfast

from . import hf_models
from .pairs import HF_NAMES, TRAINING, assert_equal, pair, replacements, results

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", HF_NAMES)
def test_saved_and_loaded(name, tmp_path):
    model, patched = pair(name, torch.float32)
    files = []
    for each in (model, patched):
        folder = tmp_path / f"{len(files)}"
        each.save_pretrained(folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(folder).train()
    assert not replacements(loaded)
    assert_equal(model, clipfast.apply_to_hf(loaded), 1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    model, patched = pair(name)
    for each in (model, patched):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:  # reentrant checkpointing needs an input that requires gradients
            each.enable_input_require_grads()
    assert_equal(model, patched)
    for each in (model, patched):
        calls = []
        each.text_model.encoder.layers[0].layer_norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        results(each, **TRAINING)
        assert len(calls) == 2


@pytest.mark.parametrize(
    ("name", "padding", "options"), [("clip", "end", {"return_loss": True}), ("siglip2", None, {})]
)
def test_compiled_as_one_graph(name, padding, options):
    _, patched = pair(name)
    given = hf_models.inputs(patched, padding)
    expected = hf_models.flat(patched(**given, **options))
    torch._dynamo.reset()
    got = hf_models.flat(torch.compile(patched, backend="eager", fullgraph=True)(**given, **options))
    for key in (".text_embeds", ".image_embeds", *([".loss"] if options else [".logits_per_text"])):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("keeps", [True, False])
def test_wrapped_by_accelerate(keeps):
    accelerate = pytest.importorskip("accelerate")
    model, patched = pair("clip", torch.float32)
    given, report = hf_models.inputs(model, "end"), clipfast.report_kernels(patched)
    try:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        theirs, ours = (accelerator.prepare_model(each) for each in (model, patched))
        assert not torch.is_tensor(ours(**given, return_loss=True).logits_per_text)
        theirs, ours = (accelerator.unwrap_model(each, keep_fp32_wrapper=keeps) for each in (theirs, ours))
        for _ in range(2):
            assert not torch.is_tensor(ours(**given, return_loss=True).logits_per_text)
            assert clipfast.report_kernels(ours) == report
            assert ours is clipfast.revert_model(ours)
            assert "nothing of this model runs on clipfast" in clipfast.report_kernels(ours)
            outputs = [hf_models.flat(each(**given, return_loss=True)) for each in (ours, theirs)]
            assert outputs[0].keys() == outputs[1].keys()
            assert all(torch.equal(outputs[0][key], x) for key, x in outputs[1].items())
            clipfast.apply_to_hf(ours)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_layers_may_be_replaced_later():
    model, patched = pair("clip")
    for each in (model, patched):
        torch.manual_seed(3)
        block = each.vision_model.encoder.layers[1]
        block.self_attn.v_proj = nn.Sequential(block.self_attn.v_proj, nn.Linear(64, 64).double())
        block.mlp = nn.Linear(64, 64).double()
        each.text_model.embeddings.token_embedding.padding_idx = 0
    given = hf_models.inputs(model)
    given["input_ids"][:, 0] = 0  # the token of padding_idx, whose embedding must get no gradient
    assert_equal(model, patched, given=given)
    assert re.search(r"(?m)^text_model\.embeddings .* as before: its tables", clipfast.report_kernels(patched))


def test_models_in_models_and_models_of_other_families():
    class Own(transformers.CLIPModel):
        def forward(self, *args, **options):
            """Run a subclass of transformers' CLIPModel, which clipfast does not patch."""
            return super().forward(*args, **options)

    own = clipfast.apply_to_hf(Own(hf_models.make("clip").config))
    assert "as before: Own is a class of its own" in clipfast.report_kernels(own)
    given = hf_models.inputs(own)
    assert own(**given, return_loss=True).logits_per_text is not None

    around = clipfast.apply_to_hf(nn.ModuleDict({"clip": hf_models.make("clip")}))
    assert "clip.text_model.encoder.layers.*.self_attn" in clipfast.report_kernels(around)
    assert not torch.is_tensor(around["clip"](**given, return_loss=True).logits_per_text)

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = bert(ids).last_hidden_state
    torch.testing.assert_close(clipfast.apply_to_hf(bert)(ids).last_hidden_state, expected)
    assert "as before: BertSelfAttention is not one of the attention classes" in clipfast.report_kernels(bert)
