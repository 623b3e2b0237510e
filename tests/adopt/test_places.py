"""Patched models: objects, hooks and settings that they keep, and how they are reverted, compiled and freed."""

import copy
import gc
import io
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import clipfast

from . import shrunk
from .pairs import HF_PARTS, PARTS, TRAINING, assert_equal, is_hf, made, pair, patch, replacements, results

NAMES = ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "clip", "siglip2"]


def objects(model: nn.Module) -> dict[str, list]:
    """Return modules, parameters, buffers, hooks and configuration of an adopted model, to compare their identity."""
    configuration = [model.config.to_dict(), model.config._attn_implementation] if is_hf(model) else []
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "configuration": configuration,
    }


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_methods_changes_and_revert_gives_them_back(name):
    model = made(name)
    before, state = objects(model), copy.deepcopy(model.state_dict())
    assert patch(model) is model
    assert objects(model) | {"attributes": before["attributes"]} == before
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    number, report = len(replacements(model)), clipfast.report_kernels(model)
    assert number
    results(model)
    patch(model)
    assert (len(replacements(model)), clipfast.report_kernels(model)) == (number, report)
    assert not replacements(patch(model, **dict.fromkeys(HF_PARTS if is_hf(model) else PARTS, False)))
    patch(model)
    for _ in range(2):
        assert clipfast.revert_model(model) is model
        assert objects(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_reverted_after_training_a_model_is_bit_equal_to_one_that_was_never_patched(name):
    model, patched = pair(name, torch.float32)
    optimizer = torch.optim.AdamW(patched.parameters(), lr=1e-3)
    for _ in range(2):
        results(patched, **TRAINING)
        optimizer.step()
    model.load_state_dict(patched.state_dict())
    clipfast.revert_model(patched)
    ours, theirs = results(patched), results(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "clip"])
def test_copies_and_pickles_are_patched_models_of_their_own(name):
    model, patched = pair(name)
    stream = io.BytesIO()
    torch.save(patched, stream)
    stream.seek(0)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched)), torch.load(stream, weights_only=False)):
        assert clipfast.report_kernels(other) == clipfast.report_kernels(patched)
        own, found = set(other.modules()), replacements(other)
        assert len(found) == len(replacements(patched))
        assert all(value.module in own and (value.owner is None or value.owner in own) for value in found)
        assert_equal(other, model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert_equal(patched, model)
        assert not replacements(clipfast.revert_model(other))
    assert replacements(patched)


def test_a_copied_part_keeps_the_owner_of_its_mask():
    _, patched = pair("ViT-B-32")
    part = copy.deepcopy(patched.transformer)
    assert {value.owner for value in replacements(part)} == {patched, None}
    x = torch.randn(2, 77, 48, dtype=torch.float64)
    torch.testing.assert_close(part(x, patched.attn_mask), patched.transformer(x, patched.attn_mask))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "clip"])
def test_hooks_fire_as_before(name):
    def calls(model: nn.Module, **options: bool) -> list[tuple[str, str]]:
        """Return the hooks of an adopted model that fire, in their order."""
        seen, handles = [], []
        for path, module in model.named_modules():
            for kind in ("forward", "forward_pre", "full_backward"):
                # PyTorch's MultiheadAttention never calls its out_proj.
                if path and not path.endswith("head.attention.out_proj"):
                    hook = getattr(module, f"register_{kind}_hook")
                    handles.append(hook(lambda *_, entry=(path, kind): seen.append(entry)))
        results(model, **options)
        for handle in handles:
            handle.remove()
        return seen

    model, patched = pair(name)
    for options in ({}, TRAINING):
        ours, theirs = calls(patched, **options), calls(model, **options)
        assert sorted(ours) == sorted(theirs)  # the order of backward hooks in parallel branches may differ
        assert [entry for entry in ours if entry[1] == "forward"] == [one for one in theirs if one[1] == "forward"]


PLACES = [
    "text_model", "text_model.encoder", "text_model.encoder.layers.1", "text_model.encoder.layers.1.self_attn.q_proj",
    "text_model.encoder.layers.1.mlp.activation_fn", "text_model.final_layer_norm", "text_model.encoder.layers.0.mlp",
    "vision_model.encoder.layers.1.self_attn", "vision_model.post_layernorm", "vision_model.embeddings.patch_embedding",
    "visual.transformer.resblocks.0.ln_2", "visual.transformer.resblocks.0.mlp.gelu",
    "visual.transformer.resblocks.0.attn",
]  # fmt: skip


@pytest.mark.parametrize("where", PLACES)
def test_a_hook_may_change_what_it_sees(where):
    def change(module, args, output):
        """Change the output of a patched module; the attention of OpenCLIP 3.3.0 returns weights too."""
        if isinstance(output, torch.Tensor):
            return 2 * output
        return (3 * output[0], *output[1:]) if isinstance(output, tuple) else None

    model, patched = pair("ViT-B-32" if where.startswith("visual.") else "clip")
    for each in (model, patched):
        each.get_submodule(where).register_forward_hook(change)
    assert_equal(model, patched)


@pytest.mark.parametrize("projection", ["k_proj", "c_proj"])
def test_a_hook_in_attention_pooling_is_respected(projection):
    model, patched = pair("RN50")
    assert re.search(r"attnpool .* clipfast\.attention_pool", clipfast.report_kernels(patched))
    for each in (model, patched):  # OpenCLIP 3.3.0 reads these layers' weights, later versions call them
        each.visual.attnpool.get_submodule(projection).register_forward_hook(lambda module, args, output: 2 * output)
    assert_equal(patched, model)
    assert re.search(r"attnpool .* as before: .* hook", clipfast.report_kernels(patched))


@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP"])
def test_checkpointing_locking_and_intermediates(name):
    model, patched = pair(name)
    for each in (model, patched):
        each.set_grad_checkpointing()
    assert_equal(patched, model)
    args = shrunk.inputs(model)
    ours, theirs = (each.forward_intermediates(*args) for each in (patched, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    if hasattr(model, "lock_image_tower"):
        for each in (model, patched):
            each.lock_image_tower(unlocked_groups=2)
            each.lock_text_tower(unlocked_layers=1)
        assert any(not parameter.requires_grad for parameter in patched.parameters())
        assert_equal(patched, model)


def test_compiled_as_one_graph():
    _, patched = pair("ViT-B-32")
    args, graphs = shrunk.inputs(patched), []

    def backend(graph, example_inputs):
        """Record the graph that torch.compile makes of a patched model."""
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(patched, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*args), patched(*args))
    assert clipfast.report_kernels(compiled) == clipfast.report_kernels(patched)
    (graph,) = graphs
    called = " ".join(str(node.target) for node in graph.graph.nodes)
    assert [called.count(f"{op}_fwd") for op in ("attention_pool", "patch_embed", "text_embed")] == [2, 1, 1]
    assert "multi_head_attention" not in called  # the patched model has seen that the mask of texts is causal
    assert "scaled_dot_product" not in called


def test_parts_may_be_given_kernels_one_by_one():
    model = shrunk.open_clip_model("ViT-B-16-SigLIP")
    clipfast.apply_to_timm(model.visual)
    alone = clipfast.report_kernels(model)
    assert alone == clipfast.report_kernels(model.visual)
    clipfast.apply_to_open_clip(model.text)
    places = {line.split()[0].split(".")[0] for line in clipfast.report_kernels(model).splitlines()[1:]}
    assert places == {"visual", "text"}
    clipfast.apply_to_open_clip(model)
    assert "visual.trunk.blocks.*.attn" in clipfast.report_kernels(model)


@pytest.mark.parametrize("name", ["RN50", "MobileCLIP2-S0", "EVA02-B-16", "clip", "siglip2"])
def test_nothing_is_left_alone_in_silence(name):
    model = patch(made(name))
    reported = (line.split()[0] for line in clipfast.report_kernels(model).splitlines()[1:])
    places = [re.compile(re.escape(place).replace(r"\*", r"\d+")) for place in reported]
    kinds = re.compile(".*(Norm|GELU).*|ReLU|SiLU" + "|.*(Attention|Embeddings).*" * is_hf(model))
    for path, module in model.named_modules():
        is_leaf = next(module.children(), None) is None
        if (is_leaf or is_hf(model)) and kinds.fullmatch(type(module).__name__):
            # The report may name the MLP for its activation, and the head for its attention.
            mentioned = [path, path.rpartition(".")[0]]
            assert any(place.fullmatch(each) for place in places for each in mentioned), path


def test_a_trace_is_that_of_the_original():
    model, patched = pair("ViT-B-32")
    args = shrunk.inputs(model)
    traced = torch.jit.trace(patched.eval(), args, check_trace=False)
    assert "clipfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*args), model.eval()(*args), rtol=0, atol=1e-12)


def test_torchscript_is_told_to_revert():
    model = clipfast.apply_to_open_clip(shrunk.open_clip_model("ViT-B-32"))
    with pytest.raises(AttributeError, match=re.escape("call clipfast.revert_model(model) before")):
        torch.jit.script(model)


def test_parameters_of_a_functional_call_count():
    model, patched = pair("ViT-B-32")
    args, others = shrunk.inputs(model), {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    ours, theirs = (torch.func.functional_call(each, others, args) for each in (patched, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_what_others_replaced_is_theirs():
    model = shrunk.open_clip_model("ViT-B-32")
    norm, attn = model.visual.ln_pre, model.visual.transformer.resblocks[0].attn
    norm.forward = theirs = lambda x: x
    clipfast.apply_to_open_clip(model)
    attn.forward = lambda *args, **options: None
    report = clipfast.report_kernels(model)
    assert "as before: something else has replaced its forward" in report
    assert "as before: something else took the place of the module or its forward" in report
    model.visual.transformer = nn.Identity()
    assert "as before: the module is gone" in clipfast.report_kernels(model)
    clipfast.revert_model(model)
    assert norm.forward is theirs


@pytest.mark.parametrize("name", ["ViT-B-32", "clip", "vit_base_patch16_siglip_224"])
def test_a_patched_model_is_freed_without_the_garbage_collector(name):
    made(name)  # the first model imports the library, before garbage collection is switched off
    gc.collect()
    gc.disable()
    try:
        model = patch(made(name, torch.float32))
        results(model, **TRAINING)
        weights = [weakref.ref(weight) for weight in model.parameters()]
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_method_without_its_model_says_so():
    forward = clipfast.apply_to_open_clip(shrunk.open_clip_model("ViT-B-32")).visual.forward
    with pytest.raises(ReferenceError, match="keep a reference to the model"):
        forward(torch.zeros(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clipfast.apply_to_open_clip("a"), TypeError, "apply_to_open_clip: model must be .*Module, got str"),
        (lambda: clipfast.report_kernels(3), TypeError, "report_kernels: model must be .*Module, got int"),
        (lambda: clipfast.apply_to_hf(nn.Linear(2, 2)), ValueError, "nothing in this Linear .* transf"),
        (lambda: clipfast.apply_to_hf(nn.Linear(2, 2), loss=1), TypeError, "loss must be a bool, got int"),
    ],
)
def test_wrong_input(call, error, message):
    pytest.importorskip("transformers")
    with pytest.raises(error, match=message):
        call()
