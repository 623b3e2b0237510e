"""The ops as PyTorch sees them: registration, compilation, autocast, and use of the graph."""

import functools

import pytest
import torch

from clipfast.kernels import attention, contrastive_loss, patch_embed

from ..conftest import INTERPRET
from ..numerics import value_and_grads
from .cases import attention_inputs, loss_inputs, patch_inputs

CPU = torch.device("cpu")


def calls(dtype, device=CPU):
    """Each op at a small size: (function, inputs, gradient)."""
    attn, attn_grad = attention_inputs((2, 9, 2, 8, True), dtype, device)
    patch, patch_grad = patch_inputs((2, 8, 12, 4, 10), dtype, device, uint8=False)
    byte, _ = patch_inputs((2, 8, 12, 4, 10), dtype, device, uint8=True)
    return {
        "contrastive_loss": (
            contrastive_loss,
            loss_inputs((11, 6), dtype, device, matched=0.3, scale=5.0),
            torch.tensor(1.0),
        ),
        "attention": (functools.partial(attention, num_heads=2, causal=True), attn, attn_grad),
        "patch_embed": (patch_embed, patch, patch_grad),
        "patch_embed of bytes": (patch_embed, byte, patch_grad),
    }


OPS = list(calls(torch.float32))
each_op = pytest.mark.parametrize("name", OPS)


@each_op
def test_opcheck(name):
    _, inputs, _ = calls(torch.float32)[name]
    overloads = {
        "contrastive_loss": ("contrastive_fwd", lambda x: (x["image"], x["text"], x["logit_scale"])),
        "attention": ("attention_fwd", lambda x: (x["qkv"], 2, True)),
        "patch_embed": ("patch_embed_fwd", lambda x: (*x.values(), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])),
    }
    op, arguments = overloads[name.removesuffix(" of bytes")]
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    torch.library.opcheck(getattr(torch.ops.clipfast, op).default, arguments(leaves))


@pytest.mark.skipif(INTERPRET, reason="the kernels compute in float32; gradcheck needs the float64 of the CPU path")
@each_op
def test_gradcheck(name):
    fn, inputs, _ = calls(torch.float64)[name]
    names = list(inputs)
    leaves = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: fn(**dict(zip(names, xs, strict=True))), leaves)


@each_op
def test_compiles_without_a_break(name):
    fn, inputs, grad = calls(torch.float32)[name]
    expected = value_and_grads(fn, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(lambda **kwargs: fn(**kwargs), backend="aot_eager", fullgraph=True)
    for key, value in value_and_grads(compiled, inputs, grad).items():
        torch.testing.assert_close(value, expected[key], msg=key)


@each_op
def test_compiles_for_any_size(name):
    torch.compiler.reset()
    fn, inputs, _ = calls(torch.float32)[name]
    compiled = torch.compile(lambda **kwargs: fn(**kwargs), backend="aot_eager", fullgraph=True, dynamic=True)
    repeated = {
        key: x.repeat(3, *[1] * (x.ndim - 1)) if x.ndim and len(x) == len(next(iter(inputs.values()))) else x
        for key, x in inputs.items()
    }
    for batch in (inputs, repeated):
        torch.testing.assert_close(compiled(**batch), fn(**batch))


@each_op
def test_graph_can_be_used_twice(name):
    fn, inputs, grad = calls(torch.float32)[name]
    once = value_and_grads(fn, inputs, grad)
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    value = fn(**leaves)
    for _ in range(2):
        value.backward(grad, retain_graph=True)
    for key, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, 2 * once[f"d_{key}"])


@each_op
def test_second_derivative_is_refused(name):
    fn, inputs, grad = calls(torch.float32)[name]
    leaf = next(x.requires_grad_() for x in inputs.values() if x.is_floating_point())
    (first,) = torch.autograd.grad(fn(**inputs), leaf, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@each_op
def test_inputs_stay_as_they_were(name):
    fn, inputs, grad = calls(torch.float32)[name]
    before = {key: x.clone() for key, x in inputs.items()}
    gradient = grad.clone()
    value_and_grads(fn, inputs, grad)
    assert all(torch.equal(inputs[key], x) for key, x in before.items())
    assert torch.equal(grad, gradient)


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_op
def test_autocast_takes_matrix_operands_down(name):
    fn, inputs, _ = calls(torch.float32)[name]
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        value = fn(**leaves)
    # attention follows its input, which a linear layer would have converted; the loss stays in float32
    expected = {"patch_embed": torch.bfloat16, "patch_embed of bytes": torch.bfloat16}
    assert value.dtype == expected.get(name, torch.float32)
    value.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values() if x.requires_grad)
    torch.testing.assert_close(value.float(), fn(**inputs), rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_op
def test_autocast_does_not_reach_inside(name):
    # Only the operands are converted: what follows is as exact as without autocast.
    fn, inputs, _ = calls(torch.bfloat16)[name]
    with torch.autocast("cpu", torch.bfloat16):
        inside = fn(**inputs)
    assert torch.equal(inside, fn(**inputs))


@each_op
def test_meta_tensors_give_shapes(name):
    fn, inputs, _ = calls(torch.float32)[name]
    value = fn(**{key: x.to("meta") for key, x in inputs.items()})
    assert value.device.type == "meta"
    assert value.shape == fn(**inputs).shape
