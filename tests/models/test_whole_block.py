"""Test that a transformer block as one autograd function has the values, gradients and memory of its modules, which are
called instead where they have hooks or were replaced.
"""

import contextlib

import pytest
import torch
import torch.nn.utils.parametrize
import torch.utils.flop_counter
from torch import nn

from clipfast.bench.stub.counts import Ops
from clipfast.kernels.launch import record_launches
from clipfast.models import transformer
from clipfast.models.layers import MLP
from clipfast.models.transformer import ResidualAttentionBlock, Transformer, read_rows, run_plain
from tests.numerics import as_good_as_torch

TOKENS, WIDTH = 9, 32


@pytest.fixture
def calls(monkeypatch):
    """Return a list to which each call of ``whole_block``, the function of a transformer block, adds its arguments."""
    found, function = [], transformer.whole_block
    monkeypatch.setattr(transformer, "whole_block", lambda *args: found.append(args) or function(*args))
    return found


def random_block(gelu="none", *, causal=False, dtype=torch.float32):
    """Return a transformer block of a model with random weights."""
    torch.manual_seed(0)
    block = ResidualAttentionBlock(
        WIDTH, 2, 4.0, causal=causal, quick_gelu=gelu == "quick", approximate=gelu if gelu == "tanh" else "none"
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.to(dtype)


def run(block, x, branch, *, whole, autocast=False, rows=()):
    """Return results and gradients of a block, as one function if ``whole``, and the bytes kept for the backward pass.

    With ``rows``, the results are these rows of the sequences.
    """
    kept = {}

    def pack(t):
        """Note the memory of a tensor that autograd keeps of a model's block."""
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    block.zero_grad()
    x = x.clone().requires_grad_()
    branch = None if branch is None else branch.clone().requires_grad_()
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        if not whole:
            patch.setattr(transformer, "whole_blocks", lambda *_: {})
        if rows == ():
            stream, out = run_plain([block], x, branch)
        else:
            stream = out = run_plain([], x, branch, None, block, rows)[0]
    weights = torch.linspace(-1, 1, stream.numel()).view_as(stream)
    (stream.double() * weights + out.double() * weights.flip(0)).sum().backward()
    found = {"stream": stream.detach(), "out": out.detach(), "x": x.grad}
    found |= {} if branch is None else {"branch": branch.grad}
    return found | {name: p.grad for name, p in block.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("has_branch", [False, True], ids=["first", "later"])
@pytest.mark.parametrize(("gelu", "causal"), [("none", False), ("quick", True), ("tanh", False)])
def test_same_values_gradients_and_memory_as_the_modules(gelu, causal, has_branch, on_gpu, calls):
    block, x = random_block(gelu, causal=causal), torch.randn(3, TOKENS, WIDTH)
    branch = torch.randn_like(x) if has_branch else None
    (ours, bytes_ours), (theirs, bytes_theirs) = (run(block, x, branch, whole=whole) for whole in (True, False))
    assert len(calls) == 1
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert bytes_ours <= bytes_theirs + 2 * 9 * WIDTH  # the slack that cast biases need under autocast


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_rule(stream, on_gpu, calls):
    block, x, branch = random_block(), torch.randn(8, TOKENS, WIDTH), torch.randn(8, TOKENS, WIDTH).bfloat16()
    ours, bytes_ours = run(block, x.to(stream), branch, whole=True, autocast=True)
    theirs, bytes_theirs = run(block, x.to(stream), branch, whole=False, autocast=True)
    assert len(calls) == 1
    truth, _ = run(random_block(dtype=torch.float64), x.to(stream).double(), branch.double(), whole=False)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        as_good_as_torch(value, theirs[name], truth[name], 2 if name in ("stream", "out") else 3, name)
    # The memory of the cast weights holds the cast biases too, 9 * WIDTH numbers of 2 bytes.
    assert bytes_ours <= bytes_theirs + 2 * 9 * WIDTH


ROWS = {"first": (False, None), "first, causal": (True, None), "others": (True, torch.tensor([4, 0, 8]))}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_branch", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("kind", ROWS)
def test_the_row_of_the_last_block(kind, has_branch, autocast, on_gpu):
    causal, rows = ROWS[kind]
    block, x = random_block(causal=causal), torch.randn(3, TOKENS, WIDTH)
    branch = torch.randn_like(x) if has_branch else None
    stream = x.bfloat16() if autocast else x
    branch = branch.bfloat16() if autocast and has_branch else branch
    ours, bytes_ours = run(block, stream, branch, whole=True, rows=rows, autocast=autocast)
    theirs, bytes_theirs = run(block, stream, branch, whole=False, rows=rows, autocast=autocast)
    if autocast:
        branch = None if branch is None else branch.double()
        truth, _ = run(
            random_block(causal=causal, dtype=torch.float64), stream.double(), branch, whole=False, rows=rows
        )
        for name, value in ours.items():
            as_good_as_torch(value, theirs[name], truth[name], 2 if name in ("stream", "out") else 3, name)
    else:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert bytes_ours <= bytes_theirs + 2 * 9 * WIDTH


def test_frozen_parameters_have_no_gradient(calls):
    block, x = random_block(), torch.randn(2, TOKENS, WIDTH)
    expected, _ = run(block, x, x, whole=False)
    frozen = {"ln_1.weight", "ln_1.bias", "attn.in_proj_bias", "attn.out_proj.weight", "mlp.c_fc.bias"}
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    found, _ = run(block, x, x, whole=True)
    assert len(calls) == 1
    assert {name for name, value in found.items() if value is None} == frozen
    kept = {name: value for name, value in found.items() if value is not None}
    torch.testing.assert_close(kept, {name: expected[name] for name in kept})


PARTS = ["ln_1", "attn", "attn.in_proj", "attn.out_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj"]


@pytest.mark.parametrize("part", PARTS)
def test_modules_with_hooks_or_of_another_class_are_called(part, calls):
    block, x, seen = random_block(), torch.randn(2, TOKENS, WIDTH), []
    module = block.get_submodule(part)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
    ):
        handle = register(lambda *args: seen.append(args[0]))
        block(x.requires_grad_()).sum().backward()
        handle.remove()
    assert seen == [module] * 3
    block.set_submodule(part, Called(module, seen))
    block(x)
    assert seen == [module] * 4
    assert not calls


def test_a_hook_may_change_the_last_block_in_the_same_pass():
    stack, x = Transformer(WIDTH, 3, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    first, _, last = stack.resblocks

    def probe(*_):
        """Double the output of the last block's MLP."""
        if not last.mlp._forward_hooks:
            last.mlp.register_forward_hook(lambda module, inputs, output: 2 * output)

    first.mlp.register_forward_hook(probe)
    torch.testing.assert_close(read_rows(stack, x), read_rows(stack, x))


class Called(nn.Module):
    """A wrapper that says when it is called, and has all attributes of the module inside."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        """Note the inner module of a model's block, and call it."""
        self.seen.append(self.inner)
        return self.inner(x)


def test_strided_parameters_and_negated_inputs_go_through_the_modules(calls):
    block, x = random_block(), torch.randn(2, TOKENS, WIDTH)
    expected = block(-x)
    calls.clear()
    torch.testing.assert_close(block(torch._neg_view(x)), expected)
    block.ln_1.weight = nn.Parameter(block.ln_1.weight.detach().repeat_interleave(2)[::2])
    torch.testing.assert_close(block(-x), expected)
    assert not calls


class Half(nn.Module):
    """A parametrization that halves a block's weight."""

    def forward(self, x):
        return x / 2


def test_changed_modules_and_parameters_are_called(calls):
    x = torch.randn(2, TOKENS, WIDTH)
    halved, expected = random_block(), random_block()
    torch.nn.utils.parametrize.register_parametrization(halved.mlp.c_fc, "weight", Half())
    expected.mlp.c_fc.weight.data /= 2
    torch.testing.assert_close(halved(x), expected(x))
    calls.clear()
    pruned = random_block()
    pruned.attn.num_heads, pruned.attn.out_proj = 1, nn.Linear(WIDTH // 2, WIDTH)
    pruned.attn.in_proj_weight = nn.Parameter(torch.randn(3 * WIDTH // 2, WIDTH))
    pruned.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH // 2))
    assert pruned(x).shape == x.shape
    mixed = random_block()
    mixed.mlp.c_fc.double()
    with pytest.raises(RuntimeError, match="dtype"):
        mixed(x)
    assert random_block()(x[:0]).shape == (0, TOKENS, WIDTH)
    seen = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module))):
        random_block()(x)
    assert nn.Linear in seen
    assert not calls


def test_a_replaced_projection_is_used_for_the_row_too():
    tower, x = Transformer(WIDTH, 2, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    tower.resblocks[-1].attn.in_proj = nn.Linear(WIDTH, 3 * WIDTH)
    expected = tower(x)[:, 0]
    torch.testing.assert_close(read_rows(tower, x), expected)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        torch.testing.assert_close(read_rows(tower, x), expected)


def test_an_input_that_is_changed_before_the_backward_pass_is_refused():
    block, x = random_block(), torch.randn(2, TOKENS, WIDTH)
    out = block(x).square().sum()
    x.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_frozen_blocks_behind_a_trained_input_are_recomputed():
    tower, x = Transformer(WIDTH, 2, 2, 4.0, causal=False).requires_grad_(False), torch.randn(2, TOKENS, WIDTH)
    (expected,) = torch.autograd.grad(tower(x.requires_grad_()).square().sum(), x)
    tower.grad_checkpointing = True
    assert torch.equal(torch.autograd.grad(tower(x).square().sum(), x)[0], expected)


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_profiler_may_watch_one_pass_of_a_recomputed_tower(watched):
    tower, x = Transformer(WIDTH, 2, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    tower.grad_checkpointing = True

    def profiled(when):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        return torch.profiler.profile(activities=cpu) if when == watched else contextlib.nullcontext()

    with profiled("forward"):
        out = tower(x.requires_grad_()).square().sum()
    with profiled("backward"):
        out.backward()
    assert x.grad.any()


@pytest.mark.parametrize("causal", [False, True])
def test_without_gradients_blocks_write_to_the_memory_of_the_one_before(causal, on_gpu):
    tower, x = Transformer(WIDTH, 9, 2, 4.0, causal=causal), torch.randn(2, TOKENS, WIDTH)
    for block in tower.resblocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.2)
    tower.resblocks[4].attn.out_proj.register_forward_hook(lambda module, args, out: out * 1.5)
    seen = []
    tower.resblocks[8].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone()) or seen.append(args[0])
    )
    of_row = Transformer(WIDTH, 4, 2, 4.0, causal=causal)
    before = x.clone()
    with_gradients = tower(x), read_rows(of_row, x)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        memories, function = [], transformer.block_without_gradients
        patch.setattr(
            transformer, "block_without_gradients", lambda *args: memories.append(args[-1]) or function(*args)
        )
        assert torch.equal(tower(x), with_gradients[0])
        assert torch.equal(read_rows(of_row, x), with_gradients[1])
    assert torch.equal(x, before)
    assert torch.equal(*seen[2:])
    # The hooks of the fifth and of the ninth block keep blocks from being alike. The last list is that of the row.
    alike = [False, False, True, True, False, False, True, False, False, False, True]
    assert [memory is not None for memory in memories] == [on_gpu and after for after in alike]


def test_without_gradients_one_block_is_cast_at_a_time_to_the_memory_of_the_one_before():
    tower, x = Transformer(WIDTH, 6, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    tower.resblocks[2].mlp = MLP(WIDTH, 2 * WIDTH, quick_gelu=False)
    tower.resblocks[4].register_forward_hook(lambda module, args, out: None)
    cast, function = [], transformer.cast_blocks

    def spied(blocks, *memory):
        """Cast parameters of blocks, and note the address of each block's first cast weight."""
        found = function(blocks, *memory)
        cast.append([one.w_in.data_ptr() for one in found])
        return found

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(transformer, "cast_blocks", spied)
        out = tower(x)
        with_gradients = [*map(len, cast)]
        cast.clear()
        with torch.no_grad():
            assert torch.equal(tower(x), out)
    assert with_gradients == [4, 1, 1]  # the hook keeps the fifth block from being cast with others
    assert [*map(len, cast)] == [1] * 6
    assert cast[0] == cast[1] == cast[3] != cast[2]


def test_checkpointing_recomputes_a_whole_block(calls):
    tower, x = Transformer(WIDTH, 2, 2, 4.0, causal=False), torch.randn(2, TOKENS, WIDTH)
    grads = []
    for tower.grad_checkpointing in (False, True):
        tower.zero_grad()
        tower(x).square().sum().backward()
        grads.append({name: p.grad for name, p in tower.named_parameters()})
    assert len(calls) == 6  # two blocks without checkpointing, and two with it, each of which is computed twice
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused():
    block, x = random_block(), torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.square().sum().backward()


def test_autocast_casts_in_few_launches():
    tower, x = Transformer(64, 5, 1, 4.0, causal=False), torch.randn(2, 8, 64, dtype=torch.bfloat16)
    with record_launches(90) as launches, Ops() as ops, torch.autocast("cpu", torch.bfloat16):
        out = tower(x.requires_grad_())
        forward = len(launches) + ops.count
        out.sum().backward()
    # In each block: two norms, attention and activation, and four products. One launch casts all weights.
    assert forward <= 5 * 8 + 2
    # In each block, the backward pass starts as many kernels for norms, attention and activation, twice the products,
    # six sums, the zeros of the keys' bias, and the cast.
    assert len(launches) + ops.count - forward <= 5 * (4 + 8 + 6 + 1 + 1) + 3


def test_the_plans_of_a_block_are_not_those_of_its_row():
    tower, x = Transformer(64, 2, 1, 4.0, causal=False), torch.randn(2, 8, 64)
    with record_launches(90), torch.no_grad():
        assert tower(x).shape == (2, 8, 64)
        assert read_rows(tower, x).shape == (2, 64)
