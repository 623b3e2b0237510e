"""What a model of transformers keeps when it is patched, and what it gets back."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import clipfast

from . import hf_models, test_hf, test_places
from .test_places import replacements

NAMES = ["clip", "siglip", "siglip2"]
TRAINING = {"loss_only": True, "return_loss": True}


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("transformers")


def objects(model: nn.Module) -> dict[str, list]:
    """Everything by which a model is known, as objects, and its configuration."""
    return test_places.objects(model) | {"configuration": [model.config.to_dict(), model.config._attn_implementation]}


def train(model: nn.Module, given: dict, steps: int = 2) -> None:
    """A few steps of AdamW."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**given, return_loss=True).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_methods_changes_and_revert_gives_them_back(name):
    model = hf_models.make(name)
    before, state = objects(model), {key: x.clone() for key, x in model.state_dict().items()}
    assert clipfast.apply_to_hf(model) is model
    after = objects(model)
    assert {key: after[key] for key in after if key != "attributes"} == {
        key: before[key] for key in before if key != "attributes"
    }
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    number, report = len(replacements(model)), clipfast.report(model)
    assert number > 10
    model(**hf_models.inputs(model, "end"), return_loss=True)
    clipfast.apply_to_hf(model)
    assert (len(replacements(model)), clipfast.report(model)) == (number, report)
    assert clipfast.revert(model) is model
    assert objects(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_reverted_after_training_a_model_is_bit_equal_to_one_that_was_never_patched(name):
    model, patched = hf_models.patched_pair(name, torch.float32)
    given = hf_models.inputs(model, "end")
    train(patched, given)
    model.load_state_dict(patched.state_dict())
    clipfast.revert(patched)
    ours, theirs = (hf_models.results(each, given) for each in (patched, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_patched_models_of_their_own(name):
    model, patched = hf_models.patched_pair(name)
    given = hf_models.inputs(model, "end")
    stream = io.BytesIO()
    torch.save(patched, stream)
    stream.seek(0)
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched)), torch.load(stream, weights_only=False)):
        assert clipfast.report(other) == clipfast.report(patched)
        found = replacements(other)
        assert len(found) == len(replacements(patched))
        assert all(value.module in set(other.modules()) for value in found)
        hf_models.assert_equal(model, other, given, **TRAINING)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        hf_models.assert_equal(model, patched, given, **TRAINING)
        assert not replacements(clipfast.revert(other))


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    model, patched = hf_models.patched_pair(name, torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    patched.save_pretrained(tmp_path / "ours")
    files = [{path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("theirs", "ours")]
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(tmp_path / "ours").train()
    assert not replacements(loaded)
    given = hf_models.inputs(model)
    hf_models.assert_equal(model, clipfast.apply_to_hf(loaded), given, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_fire_as_before(name):
    def calls(model: nn.Module, **options: bool) -> list[tuple[str, str]]:
        seen, handles = [], []
        for path, module in model.named_modules():
            for kind in ("forward", "forward_pre", "full_backward"):
                if path and not path.endswith("head.attention.out_proj"):  # PyTorch's own attention never calls it
                    hook = getattr(module, f"register_{kind}_hook")
                    handles.append(hook(lambda *_, entry=(path, kind): seen.append(entry)))
        hf_models.results(model, hf_models.inputs(model), **options)
        for handle in handles:
            handle.remove()
        return seen

    model, patched = hf_models.patched_pair(name)
    for options in ({}, TRAINING):
        ours, theirs = calls(patched, **options), calls(model, **options)
        assert sorted(ours) == sorted(theirs)  # backward hooks of branches may fire in another order
        assert [entry for entry in ours if entry[1] == "forward"] == [e for e in theirs if e[1] == "forward"]


@pytest.mark.parametrize("where", [
    "text_model", "text_model.encoder", "text_model.encoder.layers.1", "text_model.encoder.layers.1.self_attn.q_proj",
    "text_model.encoder.layers.1.mlp.activation_fn", "text_model.final_layer_norm", "text_model.encoder.layers.0.mlp",
    "vision_model.encoder.layers.1.self_attn", "vision_model.post_layernorm", "vision_model.embeddings.patch_embedding",
])  # fmt: skip
def test_a_hook_may_change_what_it_sees(where):
    def double(module, args, output):
        if isinstance(output, torch.Tensor):
            return 2 * output
        return (3 * output[0], *output[1:]) if isinstance(output, tuple) else None

    model, patched = hf_models.patched_pair("clip")
    for each in (model, patched):
        each.get_submodule(where).register_forward_hook(double)
    hf_models.assert_equal(model, patched, hf_models.inputs(model))
    hf_models.assert_equal(model, patched, hf_models.inputs(model), **TRAINING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    model, patched = hf_models.patched_pair(name)
    for each in (model, patched):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    given = hf_models.inputs(model, "end")
    if reentrant:  # without an input that requires gradients, nothing flows back from a tower
        for each in (model, patched):
            each.enable_input_require_grads()
    hf_models.assert_equal(model, patched, given, **TRAINING)
    hf_models.assert_equal(model, patched, given)
    counts = []
    for each in (model, patched):
        calls = []
        norm = each.text_model.encoder.layers[0].layer_norm1
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        hf_models.results(each, given, **TRAINING)
        counts.append(len(calls))
    assert counts == [2, 2]


@pytest.mark.parametrize(
    ("name", "padding", "options"),
    [("clip", None, {"return_loss": True}), ("clip", "end", {}), ("siglip2", "end", {"return_loss": True})],
)
def test_compiled_as_one_graph(name, padding, options):
    _, patched = hf_models.patched_pair(name)
    given = hf_models.inputs(patched, padding)
    expected = hf_models.flat(patched(**given, **options))
    torch._dynamo.reset()
    got = hf_models.flat(torch.compile(patched, backend="eager", fullgraph=True)(**given, **options))
    for key in (".text_embeds", ".image_embeds", *([".loss"] if options else [".logits_per_text"])):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-10)


class Loss(nn.Module):
    """A model that returns a tensor, as a trace must."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, pixel_values, return_loss=True).loss


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_trace_is_that_of_the_original(name):
    model, patched = (Loss(each) for each in hf_models.patched_pair(name))
    given = hf_models.inputs(model.model)
    traced = torch.jit.trace(patched, (given["input_ids"], given["pixel_values"]), check_trace=False)
    assert "clipfast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(**given), model(**given), rtol=0, atol=1e-12)


def test_the_signature_is_that_of_the_original():
    """By it the Trainer decides which columns of the data a model takes."""
    model = hf_models.make("clip")
    before = {name: inspect.signature(module.forward) for name, module in model.named_modules()}
    clipfast.apply_to_hf(model)
    assert {name: inspect.signature(module.forward) for name, module in model.named_modules()} == before
    assert "pixel_values" in before[""].parameters


@pytest.mark.parametrize("keeps", [True, False])
def test_wrapped_by_accelerate(keeps):
    accelerate = pytest.importorskip("accelerate")
    model, patched = hf_models.patched_pair("clip", torch.float32)
    given, report = hf_models.inputs(model, "end"), clipfast.report(patched)
    try:
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        theirs, ours = (accelerator.prepare_model(each) for each in (model, patched))
        assert not torch.is_tensor(ours(**given, return_loss=True).logits_per_text)
        theirs, ours = (accelerator.unwrap_model(each, keep_fp32_wrapper=keeps) for each in (theirs, ours))
        for _ in range(2):
            assert not torch.is_tensor(ours(**given, return_loss=True).logits_per_text)
            assert clipfast.report(ours) == report
            assert ours is clipfast.revert(ours)
            assert "nothing of this model runs on clipfast" in clipfast.report(ours)
            outputs = [hf_models.flat(each(**given, return_loss=True)) for each in (ours, theirs)]
            assert outputs[0].keys() == outputs[1].keys()
            assert all(torch.equal(outputs[0][key], x) for key, x in outputs[1].items())
            clipfast.apply_to_hf(ours)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


LORA = {
    "clip": ["q_proj", "v_proj", "fc1", "out_proj", "visual_projection"],
    "siglip": ["k_proj", "v_proj", "fc2"],
    # PyTorch's attention in the head would not call an adapter of its out_proj, but be merged with it.
    "siglip2": r".*(q_proj|self_attn\.out_proj|fc1)",
}


@pytest.mark.parametrize("name", NAMES)
def test_lora_trains_merges_and_loads_in_an_unpatched_model(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, patched = hf_models.patched_pair(name)
    given = hf_models.inputs(model, "end")
    wrapped = []
    for each in (copy.deepcopy(model), patched):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(each, peft.LoraConfig(r=2, target_modules=LORA[name], init_lora_weights=False))
        train(adapted, given)
        wrapped.append(adapted)
    theirs, ours = wrapped
    hf_models.assert_equal(theirs, ours, given)
    hf_models.assert_equal(theirs, ours, given, **TRAINING)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    merged = ours.merge_and_unload()
    for each in (loaded, clipfast.revert(copy.deepcopy(merged)), merged):
        each.eval()
        with torch.no_grad():
            got, expected = each(**given), theirs.eval()(**given)
        torch.testing.assert_close(got.logits_per_text, expected.logits_per_text, rtol=1e-9, atol=1e-9)


def test_an_adapter_that_their_head_does_not_call_is_not_called():
    peft = pytest.importorskip("peft")
    model, patched = hf_models.patched_pair("siglip")
    wrapped = []
    for each in (model, patched):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
        wrapped.append(peft.get_peft_model(each, config))
    hf_models.assert_equal(*wrapped, hf_models.inputs(model))
    clipfast.apply_to_hf(wrapped[0])  # a model with adapters can be patched as well
    assert test_hf.called(wrapped[0], hf_models.inputs(model)) == (4, 0)
    hf_models.assert_equal(clipfast.revert(wrapped[1]), wrapped[0], hf_models.inputs(model))


def test_layers_may_be_replaced_later():
    model, patched = hf_models.patched_pair("clip")
    for each in (model, patched):
        torch.manual_seed(3)
        block = each.vision_model.encoder.layers[1]
        block.self_attn.v_proj = nn.Sequential(block.self_attn.v_proj, nn.Linear(64, 64).double())
        block.mlp = nn.Linear(64, 64).double()
        each.text_model.embeddings.token_embedding.padding_idx = 0
    given = hf_models.inputs(model)
    given["input_ids"][:, 0] = 0  # whose row gets no gradient
    hf_models.assert_equal(model, patched, given)
    hf_models.assert_equal(model, patched, given, **TRAINING)
    (line,) = [line for line in clipfast.report(patched).splitlines() if line.startswith("text_model.embeddings")]
    assert "as before: its tables have a hook, or do more than look up" in line


def test_models_in_models_and_models_of_other_families():
    import transformers

    class Own(transformers.CLIPModel):
        def forward(self, *args, **options):
            return super().forward(*args, **options)

    own = Own(hf_models.make("clip").config)
    clipfast.apply_to_hf(own)
    assert "as before: Own is a class of its own" in clipfast.report(own)
    given = hf_models.inputs(own)
    assert own(**given, return_loss=True).logits_per_text is not None

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = hf_models.make("clip")

    around = clipfast.apply_to_hf(Around())
    assert "clip.text_model.encoder.layers.*.self_attn" in clipfast.report(around)
    assert not torch.is_tensor(around.clip(**given, return_loss=True).logits_per_text)

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = transformers.BertModel(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = bert(ids).last_hidden_state
    torch.testing.assert_close(clipfast.apply_to_hf(bert)(ids).last_hidden_state, expected)
    assert "as before: BertSelfAttention is not one of the attention classes" in clipfast.report(bert)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_alone_in_silence(name):
    model = clipfast.apply_to_hf(hf_models.make(name))
    places = [
        re.compile(re.escape(line.split()[0]).replace(r"\*", r"\d+"))
        for line in clipfast.report(model).splitlines()[1:]
    ]
    for path, module in model.named_modules():
        kind = type(module).__name__
        if "Norm" in kind or "GELU" in kind or "Attention" in kind or "Embeddings" in kind:
            # a perceptron speaks for its activation, and a head for its attention
            mentioned = [path, path.rpartition(".")[0]]
            assert any(place.fullmatch(each) for place in places for each in mentioned), (name, path)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_fully_sharded(name, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, patched = hf_models.patched_pair(name)
    given = hf_models.inputs(model, "end")
    theirs = hf_models.results(model, given, **TRAINING)
    report = clipfast.report(patched)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        scalars = {parameter for parameter in patched.parameters() if parameter.ndim == 0}  # FSDP2 takes none
        for module in list(patched.modules()):
            if type(module).__name__.endswith("EncoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(patched, mesh=mesh, ignored_params=scalars)
        for _ in range(2):
            output = patched(**given, return_loss=True)
            output.loss.backward()
        torch.testing.assert_close(output.loss, theirs["output loss"], rtol=1e-10, atol=0)
        for key, parameter in patched.named_parameters():
            if not key.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                grad = getattr(parameter.grad, "to_local", lambda grad=parameter.grad: grad)()
                torch.testing.assert_close(grad, 2 * theirs[key], rtol=1e-8, atol=1e-8)
        rows = [line for line in clipfast.report(patched).splitlines() if " pooled_last_block " in line]
        assert ["text_model: its last block has a hook" in row for row in rows] == [True]
        others = [line.split() for line in report.splitlines() if " pooled_last_block " not in line]
        assert [line.split() for line in clipfast.report(patched).splitlines() if line not in rows] == others
        assert test_hf.called(patched, given) == (4, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clipfast.apply_to_hf("clip"), TypeError, "apply_to_hf: model must be a torch.nn.Module, got str"),
        (lambda: clipfast.apply_to_hf(nn.Linear(2, 2)), ValueError, "nothing in this Linear is a module of transf"),
        (lambda: clipfast.apply_to_hf(nn.Linear(2, 2), loss=1), TypeError, "loss must be a bool, got int"),
        (lambda: clipfast.apply_to_hf(nn.Linear(2, 2), losses=True), TypeError, "losses"),
    ],
)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
