"""Test later calls of an op with a layout that it knows: modes and profilers see them, they compute what a first call
computes, and wrong arguments are refused.
"""

import functools
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from clipfast.kernels import (
    attention,
    attention_pool,
    bias_gelu,
    layer_norm,
    patch_embed,
    retrieval_ranks,
    text_embed,
    top_k,
)
from clipfast.kernels.attention import calls
from clipfast.kernels.compiled import Compiled
from clipfast.kernels.launch import Start, record_launches
from clipfast.verify.ops import lay_out

from .conftest import CALLS, Recorded, call_of, each_call, each_gradient, leaves_of, tuple_of


class Functions(TorchFunctionMode):
    """A mode that records the functions of PyTorch that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def known(name, device="cpu"):
    """Return a call of an op that has run twice with gradients and twice without, so that its layouts are known."""
    call = call_of(name, device)
    for _ in range(2):
        call.results()
        call.op(**call.inputs)
    return call


@each_call
def test_modes_and_profilers_see_the_registered_op(name):
    call, op = known(name), CALLS[name][0].torch_op
    with Recorded() as mode:
        call.results()
    assert any(op in str(function) and "clipfast" in str(function) for function, _, _ in mode.calls)
    with Functions() as functions:
        call.op(**call.inputs)
    assert any(f"clipfast.{op}" in function for function in functions.calls)
    with torch.profiler.profile() as profile:
        call.op(**call.inputs)
    assert any(f"clipfast::{op}" in event.key for event in profile.key_averages())


@each_gradient
def test_a_known_call_has_the_results_of_a_first_one(name, device):
    call = call_of(name, device)
    expected = call.results()
    for _ in range(2):
        torch.testing.assert_close(call.results(), expected, rtol=0, atol=0)
        with torch.no_grad():
            values = tuple_of(call.op(**leaves_of(call.inputs)))
        assert not any(value.requires_grad for value in values)
    # The same sizes with other strides are another layout.
    transposed = {key: lay_out(x, "transposed") for key, x in call.inputs.items()}
    for _ in range(2):
        torch.testing.assert_close(call.results(**transposed), expected)
    torch.testing.assert_close(call.results(), expected, rtol=0, atol=0)


@each_call
def test_no_tensor_of_a_known_call_is_kept(name, device):
    call = known(name, device)
    kept = [weakref.ref(x) for x in (*call.inputs.values(), *call.grads) if x.ndim]
    del call
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_wrong_options_of_known_calls():
    x, weight, bias, places = torch.randn(2, 3, 12), torch.randn(12), torch.randn(12), torch.arange(3)
    wrong = (
        (lambda eps: layer_norm(x, weight, bias, eps), 1.0, True, r"eps must be a number, got bool"),
        (lambda eps: layer_norm(x, weight, bias, eps), 1.0, [1.0], r"eps must be a number, got list"),
        (lambda heads: attention(x, heads), 1, True, r"num_heads must be an int, got bool"),
        (lambda causal: attention(x, 1, causal=causal), True, 1, r"causal must be a bool, got int"),
        (lambda bias: bias_gelu(x, bias), weight, weight.tolist(), r"bias must be a torch.Tensor, got list"),
        (lambda tokens: attention_pool(x, tokens), x + 0, [x], r"tokens must be a torch.Tensor, got list"),
        (lambda backend: bias_gelu(x, weight, backend=backend), "auto", "cuda", r"backend must be one of"),
        (lambda k: top_k(*x, k), 1, True, r"k must be an integer of at least 1, got True"),
        (lambda allowed: top_k(*x, 1, allowed=allowed), places > 0, places[:2] > 0, r"allowed must be .* \[3\]"),
        (lambda owner: retrieval_ranks(*x, text_image=owner), places, places[:2], r"text_image must be \[3\]"),
    )
    for call, right, other, message in wrong:
        call(right), call(right)
        with pytest.raises((TypeError, ValueError), match=message):
            call(other)


def test_wrong_ids_of_a_known_call():
    table, positions = torch.randn(5, 4), torch.randn(3, 4)
    text = torch.tensor([[0, 4, 1]])
    for _ in range(2):
        text_embed(text, table, positions)
    for index in (5, -1):
        with pytest.raises(IndexError, match=rf"ids of the 5 rows of token_embedding, got {index} at \(0, 1\)"):
            text_embed(torch.tensor([[0, index, 1]]), table, positions)
    with pytest.raises(IndexError, match="ids of the 5 rows"):
        text_embed(text + 1, table[:, :0], positions[:, :0])


def test_channel_values_of_a_known_call():
    images, weight = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8), torch.randn(6, 3, 2, 2)
    others = torch.randn(6), torch.randn(5, 6)
    for _ in range(2):
        expected = patch_embed(images, weight, *others, mean=(0, 0, 0), std=(1, 1, 1))
        assert torch.equal(patch_embed(images, weight, *others, mean=[0, 0, 0], std=[1, 1, 1]), expected)
        assert not torch.equal(patch_embed(images, weight, *others), expected)


def test_the_dtype_of_autocast_may_change():
    qkv = torch.randn(1, 4, 24, dtype=torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert attention(qkv, 1).dtype == dtype
        assert attention(qkv, 1).dtype == torch.bfloat16


def test_a_hook_that_moves_saved_tensors_is_refused():
    """A kernel takes addresses of tensors, so it would read an address of another device as one of its own device."""
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8), torch.randn(8)
    layer_norm(x, weight, bias).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved.to("meta")):
        y = layer_norm(x, weight, bias)
        with pytest.raises(ValueError, match="must be on one device, got cpu, meta"):
            y.sum().backward()


@pytest.mark.parametrize("shape", [(2, 5, 3, 1, 16), (2, 300, 3, 2, 64)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"seqlens": torch.tensor([3, 2])}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_addresses_are_those_of_the_tensors(shape, options, with_bias, monkeypatch):
    """A packed projection is passed to the kernels as addresses in its memory, without views of it."""
    at, seen = [], []

    def started(start, *tensors):
        """Note the addresses of a kernel's tensors instead of starting it."""
        seen.append(tuple(0 if x is None else x.data_ptr() for x in tensors))

    monkeypatch.setattr(Start, "at", lambda start, *addresses: at.append(addresses))
    monkeypatch.setattr(Start, "__call__", started)
    batch, tokens, _, heads, head_dim = shape
    for strided in (False, True):
        qkv = torch.randn(batch, tokens, 3 * heads * head_dim * (1 + strided))[..., :: 1 + strided].requires_grad_()
        bias = torch.randn(qkv.shape[-1], requires_grad=True) if with_bias else None
        with record_launches(80):
            attention(qkv, heads, bias=bias, **options).sum().backward()
    assert at
    assert at == seen


def test_heads_that_are_far_apart_are_copied():
    """The attention kernels compute an offset between heads in 32 bits, so they cannot take heads further apart."""
    near = torch.empty_strided((1, 1, 2, 1), (0, 0, 2**31 - 1, 1), device="meta")
    far = torch.empty_strided((1, 1, 2, 1), (0, 0, 2**31, 1), device="meta")
    assert calls._have_near_heads(near)
    assert not calls._have_near_heads(near, far)


def test_an_odd_address_is_left_to_triton():
    """A kernel compiled for addresses that are multiples of 16 would read the wrong memory at any other address."""
    start, started = Start(SimpleNamespace(may_start=lambda: True, index=0, stream_of=lambda index: 7)), []
    start._ready = Compiled(lambda *args: started.append(args), None)
    assert not start.at(32, 0, 24)
    assert not started
    assert start.at(32, 0, 16)
    assert started == [(7, (32, 0, 16))]


def test_a_scale_that_changes_is_seen():
    qkv, scale = torch.randn(1, 4, 24), torch.tensor(0.5)
    attention(qkv, 1, scale=scale)
    scale.fill_(3)
    assert torch.equal(attention(qkv, 1, scale=scale), attention(qkv, 1, scale=3.0))


def test_later_calls_take_the_checked_mean_and_std():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    inputs = images, torch.randn(5, 3, 4, 4), torch.randn(5), torch.randn(5, 5)
    mean, std = (tuple(np.array(values, np.float16)) for values in ((0.48, 0.45, 0.4), (0.26, 0.27, 0.28)))
    first, later = (patch_embed(*inputs, mean=mean, std=std) for _ in range(2))
    assert torch.equal(first, later)


def test_a_mean_that_changes_is_seen():
    images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    call = functools.partial(patch_embed, images, torch.randn(5, 3, 4, 4), torch.randn(5), torch.randn(5, 5))
    for mean in (torch.zeros(3), torch.zeros(3).unbind()):
        call(mean=mean, std=(1, 1, 1))
        for value in mean:
            value.fill_(3)
        assert torch.equal(call(mean=mean, std=(1, 1, 1)), call(mean=(3, 3, 3), std=(1, 1, 1)))


def test_the_output_of_attention_may_be_changed_in_place():
    with torch.no_grad():
        out = attention(torch.randn(1, 4, 24), 1)
    out.mul_(torch.ones(8, requires_grad=True)).sum().backward()
