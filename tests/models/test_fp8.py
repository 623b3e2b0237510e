"""Test transformer blocks whose linear layers multiply in 8 bits: a block as one function and as modules has equal
bits, some layers keep 16 bits, and checkpoints hold no 8-bit weights.
"""

import weakref

import pytest
import torch
from torch import nn

from clipfast import contrastive_loss, create_model, get_model_config, report_kernels
from clipfast.kernels.fp8 import E4M3, RECIPES, Fp8Rows, linear
from clipfast.kernels.fp8_rows import rounded, rows_beside
from clipfast.models import block_parts, build, fp8_layers, layers, transformer, whole_block
from clipfast.models.transformer import Transformer, read_rows, run_plain

from .test_whole_block import TOKENS, WIDTH, random_block, run

WEIGHTS = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}


@pytest.fixture
def model():
    """Return a tiny CLIP whose text tower has two blocks, and its image tower four."""
    torch.manual_seed(0)
    return create_model("ViT-T-8-32", force_context_length=12)


@pytest.fixture
def inputs():
    """Return a batch of random images and texts for the model."""
    texts = torch.randint(1, 1000, (4, 12))
    texts[:, -1] = 49407
    return torch.randn(4, 3, 32, 32), texts


def set_fp8(block, recipe):
    """Let the linear layers of one block multiply in 8 bits."""
    block.attn.fp8 = block.mlp.fp8 = recipe
    return block


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_branch", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(("gelu", "causal"), [("none", False), ("quick", True), ("tanh", False)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_function_differs_from_the_modules_in_gradients_of_weights_alone(
    recipe, gelu, causal, has_branch, autocast, on_gpu
):
    block, x = set_fp8(random_block(gelu, causal=causal), recipe), torch.randn(3, TOKENS, WIDTH)
    x = x.bfloat16() if autocast else x
    branch = torch.randn_like(x) if has_branch else None
    ours, bytes_ours = run(block, x, branch, whole=True, autocast=autocast)
    theirs, bytes_theirs = run(block, x, branch, whole=False, autocast=autocast)
    if autocast and not has_branch:  # with or without fp8, autograd rounds the two gradients of x before it adds them
        torch.testing.assert_close(ours.pop("x"), theirs.pop("x"), rtol=0.02, atol=0.1)
    assert ours.keys() == theirs.keys()
    differ = {name for name, value in ours.items() if not torch.equal(value, theirs[name])}
    assert differ == (WEIGHTS if recipe == "switchback" else set())
    assert bytes_ours <= bytes_theirs
    of_16_bits = run(set_fp8(block, None), x, branch, whole=True, autocast=autocast)
    assert bytes_ours < of_16_bits[1]
    assert not torch.equal(ours["out"], of_16_bits[0]["out"])


@pytest.mark.parametrize("gelu", ["none", "quick", "tanh"])
def test_gradients_of_weights_read_inputs_that_were_not_rounded(gelu, on_gpu, monkeypatch):
    multiplied, read = [], []
    linear, weight_grad = fp8_layers.linear, whole_block.weight_grad
    monkeypatch.setattr(fp8_layers, "linear", lambda x, *args: multiplied.append(x) or linear(x, *args))
    for module in (whole_block, block_parts):
        monkeypatch.setattr(module, "weight_grad", lambda grad, x, dtype: read.append(x) or weight_grad(grad, x, dtype))
    run(set_fp8(random_block(gelu), "switchback"), torch.randn(3, TOKENS, WIDTH), None, whole=True)
    for rows, x in zip(multiplied[::-1], read, strict=True):
        values, scale = rounded(x, E4M3)
        torch.testing.assert_close(scale, rows.scale)
        # An error in the last digits of float32 may decide how a number halfway between two 8-bit numbers is rounded.
        assert (values.float() != rows.values.float()).double().mean() <= 0.01
        assert (x != rows.wide()).double().mean() > 0.5


def test_the_activation_is_freed_after_the_gradient_of_its_weight(on_gpu, monkeypatch):
    read, are_alive = [], []
    weight_grad, norm_grads = whole_block.weight_grad, whole_block.norm_grads

    def noted(ctx, name, *args):
        """Note, at the gradients of the second norm, whether the activation of the block is in memory still."""
        if name == "norm_2":
            are_alive.append(read[0]() is not None)
        return norm_grads(ctx, name, *args)

    monkeypatch.setattr(
        whole_block, "weight_grad", lambda grad, x, dtype: read.append(weakref.ref(x)) or weight_grad(grad, x, dtype)
    )
    monkeypatch.setattr(whole_block, "norm_grads", noted)
    run(set_fp8(random_block(), "switchback"), torch.randn(3, TOKENS, WIDTH), None, whole=True)
    assert are_alive == [False]


@pytest.mark.parametrize("is_read", [False, True], ids=["", "branch is read"])
def test_gradients_bring_their_rows_from_block_to_block(is_read, on_gpu, monkeypatch):
    blocks = [set_fp8(random_block(), "switchback") for _ in range(2)]
    x, found = torch.randn(2, TOKENS, WIDTH), []

    def grads():
        """Return the gradients of two blocks, whose loss may also read the first one's branch."""
        count = 1 if is_read else 2
        t, m = run_plain(blocks[:count], x.clone().requires_grad_(), None)
        total = sum(y.square().sum() for y in run_plain(blocks[count:], t, m))
        total = total + m.square().sum() if is_read else total
        return torch.autograd.grad(total, [parameter for block in blocks for parameter in block.parameters()])

    def spied(grad):
        """Note whether the gradient of a linear layer's output brought its rows in 8 bits."""
        rows = rows_beside(grad)
        found.append(rows[0] is not None)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(whole_block, "lay_beside", lambda *_: None)
        expected = grads()
    monkeypatch.setattr(fp8_layers, "rows_beside", spied)
    assert all(map(torch.equal, grads(), expected))
    # A block looks once at the gradient of each linear layer's output, in the order c_proj, c_fc, out_proj and in_proj.
    later = [on_gpu, True, False]
    assert found == [False, *later, not is_read, *later]


def test_a_backward_pass_may_run_in_inference_mode_or_batched(on_gpu):
    blocks = [set_fp8(random_block(), "switchback") for _ in range(2)]
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    y = sum(run_plain(blocks, x, None))
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, x, gradient, retain_graph=True)
    with torch.inference_mode():  # PyTorch does not count the changes of tensors that are made in this mode
        assert torch.equal(*expected, *torch.autograd.grad(y, x, gradient, retain_graph=True))
    both = torch.autograd.grad(y, x, torch.stack([gradient, gradient]), is_grads_batched=True)
    torch.testing.assert_close(*both, torch.stack(expected * 2))


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_calls_by_one_plan_have_one_layout(recipe, on_gpu, monkeypatch):
    known, compute = {}, whole_block.compute

    def checked(plans, op, name, *args):
        """Compute an op of a block if its tensors have the layout of earlier calls by the same plan."""
        layout = [(x.shape, x.stride(), x.dtype) for x in args if isinstance(x, torch.Tensor)]
        assert known.setdefault((id(plans), op, name), layout) == layout
        return compute(plans, op, name, *args)

    for module in (whole_block, fp8_layers):
        monkeypatch.setattr(module, "compute", checked)
    for hidden in (4 * WIDTH, 2 * WIDTH):
        block = set_fp8(random_block(), recipe)
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        run(block, torch.randn(3, TOKENS, WIDTH), None, whole=True)


def test_a_frozen_weight_has_no_gradient():
    block, x = set_fp8(random_block(), "full"), torch.randn(2, TOKENS, WIDTH)
    expected, _ = run(block, x, x, whole=False)
    frozen = {"attn.in_proj_bias", "attn.out_proj.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"}
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found, _ = run(block, x, x, whole=True)
    assert {name for name, value in found.items() if value is None} == frozen
    assert all(torch.equal(value, expected[name]) for name, value in found.items() if value is not None)


class Half(nn.Linear):
    """A subclass of the linear layer, as an adapter might put it in the layer's place."""

    def forward(self, x):
        """Return half of the layer's output."""
        return super().forward(x) / 2


def test_only_plain_linear_layers_of_chosen_blocks_multiply_in_8_bits(monkeypatch, model, inputs):
    seen = []

    def product(x, weight, *args, **kwargs):
        """Note the weight of a linear layer in 8 bits, and return its product."""
        seen.append(weight)
        return (x.dequantize() if isinstance(x, Fp8Rows) else x) @ weight.T

    monkeypatch.setattr(layers, "fp8_linear", product)
    monkeypatch.setattr(transformer, "whole_blocks", lambda *_: {})
    blocks = model.visual.transformer.resblocks
    model.set_fp8("switchback", skip=(1, 1))
    model(*inputs)
    expected = [
        weight
        for block in blocks[1:-1]  # the text tower has only the two blocks that are skipped
        for weight in (
            block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight
        )
    ]  # fmt: skip
    assert list(map(id, seen)) == list(map(id, expected))
    assert "visual.transformer.resblocks: linear layers of 2 of 4 blocks in 8 bits, recipe sw" in report_kernels(model)
    seen.clear()
    blocks[1].mlp.c_fc.__class__ = Half
    model(*inputs)
    assert len(seen) == len(expected) - 1
    seen.clear()
    model.set_fp8(None)
    model(*inputs)
    assert not seen


@pytest.mark.parametrize("name", ["ViT-T-8-32", "ViT-B-16-SigLIP", "naflex_ViT-B-32"])
def test_every_tower_has_blocks_in_8_bits(name):
    with torch.device("meta"):
        model = build(get_model_config(name))
    model.set_fp8("full", skip=(1, 0))
    kinds = (layers.Attention, layers.MLP)
    found = [module.fp8 for module in model.modules() if isinstance(module, kinds)]
    # The first block of each tower keeps 16 bits, and so does the MLP of an attention pooling.
    assert (found.count("full") + 4, "full" in found) in ((len(found), True), (len(found) - 1, True))


def test_a_last_block_in_8_bits_computes_all_rows():
    tower, x = Transformer(WIDTH, 2, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    set_fp8(tower.resblocks[-1], "switchback")
    assert torch.equal(read_rows(tower, x), tower(x)[:, 0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_stay_near_those_of_float32_in_all_ways_to_run(recipe, model, inputs, monkeypatch):
    def gradients(fp8, checkpointing=False, compiled=False):
        """Return the gradients of a model's parameters by the contrastive loss, with blocks in 8 bits if ``fp8``."""
        model.set_fp8(fp8, skip=(0, 0))
        model.set_grad_checkpointing(bool(checkpointing), selective=checkpointing == "selective")
        model.zero_grad()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        image, text, scale = call(*inputs)
        contrastive_loss(image, text, scale).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    exact, ours = gradients(None), gradients(recipe)
    for name, grad in exact.items():
        assert torch.cosine_similarity(ours[name].flatten(), grad.flatten(), dim=0) > 0.9 or grad.ndim < 2, name
    for checkpointing in (True, "selective"):
        again = gradients(recipe, checkpointing)
        assert all(torch.equal(again[name], grad) for name, grad in ours.items())
    monkeypatch.setattr(transformer, "whole_blocks", lambda *_: {})
    of_selective, of_modules = gradients(recipe, "selective"), gradients(recipe)
    assert all(torch.equal(of_selective[name], grad) for name, grad in of_modules.items())
    if recipe == "full":  # test_fp8_training.py compiles the other recipe
        torch.testing.assert_close(gradients(recipe, compiled=True), of_modules, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_selective_checkpointing_computes_no_product_twice(recipe, model, inputs, monkeypatch):
    products, multiply = [], linear.multiply
    for module in (linear, fp8_layers):
        monkeypatch.setattr(module, "multiply", lambda *args: products.append(args) or multiply(*args))
    model.set_fp8(recipe, skip=(0, 0))
    counts = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing, selective=True)
        contrastive_loss(*model(*inputs)).backward()
        counts.append(len(products))
        products.clear()
    assert counts[0] == counts[1]


def test_checkpoints_hold_no_8_bits(model, tmp_path):
    names = {name: value.dtype for name, value in model.state_dict().items()}
    model.set_fp8("switchback")
    assert {name: value.dtype for name, value in model.state_dict().items()} == names
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = create_model("ViT-T-8-32", str(tmp_path / "model.pt"), force_context_length=12)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("arguments", "said"), [(("int8",), "'switchback' or 'full'"), (("full", (0, -1)), "skip")])
def test_what_set_fp8_refuses(model, arguments, said):
    with pytest.raises(ValueError, match=said):
        model.set_fp8(*arguments)
