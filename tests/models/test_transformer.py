"""Test transformer blocks: fused operations, rows that need not be computed, hooks and adapters, and the report of
kernels.
"""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast.models.layers import Attention, InProjection
from clipfast.models.transformer import Transformer, read_rows

VIEWS = {"aten.select.int",
    "aten.view.default", "aten._unsafe_view.default", "aten.t.default", "aten.detach.default", "aten.unbind.int",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """A dispatch mode that counts the operations that launch a kernel; views are not counted."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) not in VIEWS:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("causal", "quick_gelu", "on_gpu"),
    # QuickGELU on a CPU is left out: PyTorch computes it by several operations there, which clipfast does not fuse.
    [(True, False, False), (False, True, True)],
    indirect=["on_gpu"],
)
def test_a_block_has_no_operation_too_many(causal, quick_gelu, on_gpu):
    tower = Transformer(64, 3, 2, 4.0, causal=causal, quick_gelu=quick_gelu)
    x = torch.randn(2, 17, 64, requires_grad=True)
    with Operations() as forward:
        out = tower(x)
    grad = torch.randn(out.shape)
    with Operations() as backward:
        out.backward(grad)
    hidden = {"clipfast.bias_act_fwd.default": 3, "aten.mm.default": 3} if on_gpu else {"aten.gelu.default": 3}
    assert forward.counts == hidden | {
        "clipfast.layer_norm_fwd.default": 3 * 2,
        "aten.addmm.default": 3 * (3 if on_gpu else 4),
        "clipfast.attention_fwd.default": 3,
        "aten.add.Tensor": 1,  # of the last branch to the residual stream; layer norms fuse all others
    }
    activation = "clipfast.bias_act_bwd.default" if on_gpu else "aten.gelu_backward.default"
    assert backward.counts == {
        "clipfast.layer_norm_bwd.default": 3 * 2,
        "aten.mm.default": 3 * 8,
        # Sums for the gradients of biases, except that of in_proj, which attention sums, and on a GPU that of c_fc,
        # which the activation sums.
        "aten.sum.dim_IntList": 3 * (2 if on_gpu else 3),
        "clipfast.attention_bwd.default": 3,
        activation: 3,
        "aten.add.Tensor": 1,  # the gradients of the tower's input, from the residual stream and from the first norm
    }


def gradients(module, x, call=None):
    """Return the result of a transformer, or of ``call``, and the gradients of its input and of each parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    out = (call or module)(x)
    out.square().sum().backward()
    return {"out": out, "x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}


def random_tower(causal, quick_gelu=False, dtype=torch.float64):
    """Return a transformer with random weights."""
    tower = Transformer(32, 2, 2, 4.0, causal=causal, quick_gelu=quick_gelu).to(dtype)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    return tower


ROWS = {"class": (False, None), "end of text": (True, torch.tensor([4, 0, 8]))}


def read_with_grads(tower, rows, x):
    """Return the rows of a transformer's result that a model reads, and the gradients."""
    return gradients(tower, x, lambda x: read_rows(tower, x, rows))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ROWS)
def test_the_last_block_computes_the_row_that_is_read(kind, checkpointed):
    causal, rows = ROWS[kind]
    tower, x = random_tower(causal), torch.randn(3, 9, 32, dtype=torch.float64)
    handle = tower.resblocks[-1].mlp.c_fc.register_forward_hook(lambda *_: None)
    expected = read_with_grads(tower, rows, x)
    handle.remove()
    tower.grad_checkpointing = checkpointed
    with FlopCounterMode(display=False) as short:
        actual = read_with_grads(tower, rows, x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    tower.resblocks[-1].attn.backend = "torch"  # the reference computes every row
    with FlopCounterMode(display=False) as full:
        read_with_grads(tower, rows, x)
    assert short.get_total_flops() < (0.7 if checkpointed else 0.6) * full.get_total_flops()


def test_selective_checkpointing_repeats_no_product(on_gpu):
    tower, x = random_tower(True), torch.randn(3, 9, 32, dtype=torch.float64)
    runs = {}
    for kind in (False, "selective", True):
        tower.grad_checkpointing = kind
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            runs[kind] = read_with_grads(tower, ROWS["end of text"][1], x), flops.get_total_flops(), operations.counts
    kept, selective, whole = runs.values()
    torch.testing.assert_close(selective[0], kept[0], rtol=1e-12, atol=1e-12)
    assert selective[1] == kept[1] < whole[1]
    repeated = {name for name, count in selective[2].items() if count > kept[2][name]}
    activation = "clipfast.bias_act_fwd.default" if on_gpu else "aten.gelu.default"
    assert {"clipfast.layer_norm_fwd.default", activation} <= repeated
    assert not any("mm" in name or "attention" in name for name in repeated)


def test_a_hook_in_the_last_block_sees_every_row():
    tower, x, seen = random_tower(False), torch.randn(3, 9, 32, dtype=torch.float64), []
    for name in ("", "ln_1", "attn", "attn.in_proj", "attn.out_proj", "ln_2", "mlp", "mlp.c_fc", "mlp.gelu"):
        module = tower.resblocks[-1].get_submodule(name)
        handle = module.register_forward_hook(lambda module, args, out: seen.append(out.shape[:2]))
        read_rows(tower, x)
        handle.remove()
    assert seen == [(3, 9)] * 9
    tower.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    read_rows(tower, x)
    assert seen[-1] == (3, 9, 32)


@pytest.mark.parametrize(("tokens", "pools"), [(1024, True), (1025, False)])
def test_more_tokens_than_the_pool_takes(tokens, pools):
    tower, x = random_tower(False, dtype=torch.float32), torch.randn(1, tokens, 32)
    with torch.no_grad(), Operations() as operations:
        out = read_rows(tower, x)
    assert operations.counts["clipfast.attention_pool_fwd.default"] == pools
    torch.testing.assert_close(out, tower(x)[:, 0], rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_mlp(on_gpu):
    # test_whole_block.py has hooks, in all modules of a block.
    tower, x = Transformer(32, 1, 2, 4.0, causal=False, quick_gelu=False), torch.randn(2, 9, 32)
    expected, mlp = gradients(tower, x), tower.resblocks[0].mlp
    mlp.c_fc = LowRank(mlp.c_fc)
    nn.init.zeros_(mlp.c_fc.b.weight)
    adapted = gradients(tower, x)
    for name, value in expected.items():
        torch.testing.assert_close(adapted[name.replace("c_fc", "c_fc.base")], value, rtol=1e-4, atol=1e-4)


def test_another_activation_is_not_taken_for_ours(on_gpu):
    tower, x = Transformer(32, 1, 2, 4.0, causal=False, quick_gelu=False), torch.randn(2, 9, 32)
    mlp = tower.resblocks[0].mlp
    mlp.gelu = nn.GELU(approximate="tanh")
    assert torch.equal(mlp(x), mlp.c_proj(mlp.gelu(mlp.c_fc(x))))


class LowRank(nn.Module):
    """An adapter around a linear layer, as LoRA (Hu et al. 2022) has it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        """Apply a linear layer of a model and its low-rank adapter."""
        return self.base(x) + self.b(self.a(x))


def test_projections_are_linear_layers_that_an_adapter_can_wrap():
    attn = Attention(32, 2, causal=False)
    nn.init.normal_(attn.in_proj_bias)
    names, x, seen = set(attn.state_dict()), torch.randn(2, 9, 32), []
    assert names == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert all(isinstance(attn.get_submodule(name), nn.Linear) for name in ("in_proj", "out_proj"))
    plain = gradients(attn, x)
    handle = attn.in_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    hooked = gradients(attn, x)
    handle.remove()
    assert seen == [(2, 9, 96)]
    attn.in_proj = LowRank(attn.in_proj)
    nn.init.zeros_(attn.in_proj.b.weight)
    assert set(attn.state_dict()) == names | {"in_proj.a.weight", "in_proj.b.weight"}
    adapted = gradients(attn, x)
    nn.init.normal_(attn.in_proj.b.weight)
    merged = copy.deepcopy(attn)
    merged.in_proj.base.weight.data += merged.in_proj.b.weight @ merged.in_proj.a.weight
    merged.in_proj = InProjection(merged)
    pairs = (hooked, plain, 1e-5), (adapted, plain, 1e-5), (gradients(attn, x), gradients(merged, x), 1e-4)
    for found, expected, tolerance in pairs:
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_report_names_the_kernels():
    model = clipfast.create_model("ViT-L-14", device="meta")
    text = clipfast.report_kernels(model, 90)
    assert "visual.transformer: 23 x attention, 257 tokens, 16 heads of 64: forward looped" in text
    assert "last block: attention_pool of the row that is read, 16 queries of 1024" in text
    model.visual.transformer.resblocks[-1].register_forward_hook(lambda *_: None)
    assert "visual.transformer: 24 x attention" in clipfast.report_kernels(model, 80)
    for name, expected in (
        ("RN50", "attnpool: attention_pool, 50 tokens"),
        ("ViT-SO400M-16-SigLIP2-384", "visual.trunk.attn_pool: attention_pool, 576 tokens, 16 queries of 1152"),
    ):
        assert expected in clipfast.report_kernels(clipfast.create_model(name, device="meta"), 90)
