"""The ops as PyTorch sees them: registration, compilation, autocast, and use of the graph."""

import pytest
import torch

from clipfast.kernels import contrastive_loss

from ..conftest import INTERPRET, LEG
from ..numerics import value_and_grads
from .cases import small_calls, strided

OPS = list(small_calls(torch.float32, torch.device("cpu")))
each_op = pytest.mark.parametrize("name", OPS)


NORMALISATION = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], torch.float32)


@each_op
def test_opcheck(name, device):
    _, inputs, _ = small_calls(torch.float32, device)[name]
    overloads = {
        "contrastive_loss": ("contrastive_fwd", lambda x: (*x.values(), 0, True, True, torch.float32, False)),
        "info_nce_loss": ("info_nce_fwd", lambda x: (*x.values(), True, True, torch.float32)),
        "nt_xent_loss": ("nt_xent_fwd", lambda x: (*x.values(), True, torch.float32)),
        "sigmoid_loss": ("sigmoid_fwd", lambda x: (*x.values(), 0, True, torch.float32)),
        "attention": (
            "attention_fwd",
            lambda x: (
                x["qkv"],
                torch.ones(48, device=device),
                torch.tensor([9, 3], dtype=torch.int32, device=device),
                2,
                True,
                0.5,
            ),
        ),
        "attention_qkv": (
            "attention_qkv_fwd",
            lambda x: (*x.values(), torch.tensor([9, 3], dtype=torch.int32, device=device), False, 0.5),
        ),
        "attention_pool": ("attention_pool_fwd", lambda x: (*x.values(), None)),
        "attention_pool of lengths": ("attention_pool_fwd", lambda x: (*x.values(),)),
        "layer_norm": ("layer_norm_fwd", lambda x: (x["x"], None, x["weight"], x["bias"], 1e-5)),
        "layer_norm of a sum": (
            "layer_norm_fwd",
            lambda x: (x["x"], x["residual"], x["weight"], x["bias"], 1e-5),
        ),
        "layer_norm_pair": ("layer_norm_pair_fwd", lambda x: (*x.values(), 1e-5, 1e-2)),
        "bias_gelu": ("bias_act_fwd", lambda x: (*x.values(), False)),
        "bias_quick_gelu": ("bias_act_fwd", lambda x: (*x.values(), True)),
        "patch_embed": ("patch_embed_fwd", lambda x: (*x.values(), None, *NORMALISATION)),
        "patch_embed of kept patches": (
            "patch_embed_fwd",
            lambda x: (*x.values(), *NORMALISATION),
        ),
        "text_embed": ("text_embed_fwd", lambda x: (*x.values(), torch.float32)),
    }
    op, arguments = overloads[name.removesuffix(" of bytes")]
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    torch.library.opcheck(getattr(torch.ops.clipfast, op).default, arguments(leaves))


@pytest.mark.skipif(LEG != "cpu", reason="the kernels compute in float32; gradcheck needs the float64 of the CPU path")
@each_op
def test_gradcheck(name, device):
    fn, inputs, _ = small_calls(torch.float64, device)[name]
    names = list(inputs)
    leaves = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *xs: fn(**dict(zip(names, xs, strict=True))), leaves)


@each_op
def test_compiles_without_a_break(name, device):
    fn, inputs, grad = small_calls(torch.float32, device)[name]
    expected = value_and_grads(fn, inputs, grad)
    torch.compiler.reset()
    compiled = torch.compile(lambda **kwargs: fn(**kwargs), backend="aot_eager", fullgraph=True)
    for key, value in value_and_grads(compiled, inputs, grad).items():
        torch.testing.assert_close(value, expected[key], msg=key)


class Counting:
    """A compiler backend that counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)


@each_op
def test_compiles_once_for_every_batch_size(name, device):
    torch.compiler.reset()
    backend = Counting()
    compiled = torch.compile(lambda fn, inputs: fn(**inputs), backend=backend, fullgraph=True, dynamic=True)
    counts = []
    for scale in (1, 2, 5):
        fn, inputs, grad = small_calls(torch.float32, device, scale)[name]
        leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
        value = compiled(fn, leaves)
        torch.testing.assert_close(value, fn(**inputs))
        value.backward(grad.to(value))
        # one compilation may ask twice; another batch size must not ask again
        counts.append(backend.graphs)
    assert counts == [counts[0]] * 3


def test_compiles_once_for_every_scale(device):
    torch.compiler.reset()
    backend = Counting()
    compiled = torch.compile(lambda x, scale: contrastive_loss(x, x, scale), backend=backend, fullgraph=True)
    x = torch.randn(7, 8, device=device)
    for scale in torch.tensor([2.5, 3.5, 4.5], device=device):
        torch.testing.assert_close(compiled(x, scale), contrastive_loss(x, x, scale))
    assert backend.graphs == 1


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_op
def test_backward_ops_are_registered_as_they_are(name, layout, device):
    # With other strides than the fake promises, compiled code reads the gradients wrongly.
    fn, inputs, grad = small_calls(torch.float32, device)[name]
    inputs = {key: strided(x, layout) if x.ndim > 1 else x for key, x in inputs.items()}
    recorded = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "clipfast" and "bwd" in func.name():
                recorded.append((func, args))
            return func(*args, **(kwargs or {}))

    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    with Record():
        value = fn(**leaves)
        value.backward(strided(grad, layout).to(value) if grad.ndim > 1 else grad.to(value))
    assert recorded
    for op, arguments in recorded:
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(op, tuple(detached), test_utils=("test_schema", "test_faketensor"))


@each_op
def test_graph_can_be_used_twice(name, device):
    fn, inputs, grad = small_calls(torch.float32, device)[name]
    once = value_and_grads(fn, inputs, grad)
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    value = fn(**leaves)
    for _ in range(2):
        value.backward(grad.to(value), retain_graph=True)
    for key, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, 2 * once[f"d_{key}"])


@each_op
def test_second_derivative_is_refused(name, device):
    fn, inputs, grad = small_calls(torch.float32, device)[name]
    leaf = next(x.requires_grad_() for x in inputs.values() if x.is_floating_point())
    (first,) = torch.autograd.grad(fn(**inputs), leaf, grad.to(device).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


@each_op
def test_inputs_stay_as_they_were(name, device):
    fn, inputs, grad = small_calls(torch.float32, device)[name]
    before = {key: x.clone() for key, x in inputs.items()}
    gradient = grad.clone()
    value_and_grads(fn, inputs, grad)
    assert all(torch.equal(inputs[key], x) for key, x in before.items())
    assert torch.equal(grad, gradient)


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_op
def test_autocast_takes_matrix_operands_down(name, device):
    fn, inputs, _ = small_calls(torch.float32, device)[name]
    leaves = {key: x.detach().requires_grad_(x.is_floating_point()) for key, x in inputs.items()}
    with torch.autocast(device.type, torch.bfloat16):
        value = fn(**leaves)
    # the loss itself stays in float32, and what is no product takes its stream as it is
    streams = ("layer_norm", "layer_norm_pair", "bias_gelu", "bias_quick_gelu")
    as_it_is = name.endswith("loss") or name.split()[0] in streams
    assert value.dtype == (torch.float32 if as_it_is else torch.bfloat16)
    value.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values() if x.requires_grad)
    torch.testing.assert_close(value.float(), fn(**inputs), rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_op
def test_autocast_does_not_reach_inside(name, device):
    # Only the operands are converted: what follows is as exact as without autocast.
    fn, inputs, _ = small_calls(torch.bfloat16, device)[name]
    with torch.autocast(device.type, torch.bfloat16):
        inside = fn(**inputs)
    assert torch.equal(inside, fn(**inputs))


@each_op
def test_meta_tensors_give_shapes(name, device):
    fn, inputs, _ = small_calls(torch.float32, device)[name]
    value = fn(**{key: x.to("meta") for key, x in inputs.items()})
    assert value.device.type == "meta"
    assert value.shape == fn(**inputs).shape
