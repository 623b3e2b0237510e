"""The ops as PyTorch sees them: registration, compilation, autocast, and use of the graph."""

import functools

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

from clipfast.kernels import contrastive_loss
from clipfast.verify.inputs import lay_out
from clipfast.verify.rule import value_and_grads

from ..conftest import INTERPRET, LEG, OnlyMeta
from .conftest import CALLS, Recorded, call_of, each_call, each_gradient, far_apart, leaves_of, tuple_of


def recorded(call, leaves):
    """The registered ops that a call, forward and backward, comes down to."""
    with Recorded() as mode:
        call.backward(call.op(**leaves))
    found = [(op, arguments) for op, arguments, _ in mode.calls if op.namespace == "clipfast"]
    assert found
    return found


def again(x):
    """The same argument as a leaf of its own."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def check(calls):
    """opcheck of registered ops; the arguments of a backward pass need no gradient."""
    for op, arguments in calls:
        if "bwd" in op.name():
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            torch.library.opcheck(op, tuple(detached), test_utils=("test_schema", "test_faketensor"))
        else:
            torch.library.opcheck(op, tuple(map(again, arguments)))


# With other strides than the fake promises, compiled code would read results wrongly.
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_call
def test_registered_ops(name, layout, device):
    call, layout_of = call_of(name, device), functools.partial(lay_out, layout=layout)
    leaves = leaves_of({key: layout_of(x) for key, x in call.inputs.items()})
    check(recorded(call._replace(grads=tuple(map(layout_of, call.grads))), leaves))


@each_gradient
def test_gradient_of_each_input_alone(name, device):
    # frozen parameters: a gradient that is not needed may be left out, and the others stay the same
    call = call_of(name, device)
    expected = call.results()
    for wanted, x in call.inputs.items():
        if x.is_floating_point():
            leaves = {key: y.detach().requires_grad_(key == wanted) for key, y in call.inputs.items()}
            check(recorded(call, leaves))
            torch.testing.assert_close(leaves[wanted].grad, expected[f"d_{wanted}"], rtol=0, atol=0, msg=wanted)


@pytest.mark.skipif(LEG != "cpu", reason="the kernels compute in float32; gradcheck needs the float64 of the CPU path")
@each_gradient
def test_gradcheck(name, device):
    call = call_of(name, device, torch.float64)
    leaves = leaves_of(call.inputs)
    assert torch.autograd.gradcheck(lambda *xs: call.op(**dict(zip(leaves, xs, strict=True))), [*leaves.values()])


@each_call
def test_compiles_without_a_break(name, device):
    call = call_of(name, device)
    expected = call.results()
    torch.compiler.reset()
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(lambda **kwargs: call.op(**kwargs), backend=backend, fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled, call.inputs, call.grads), expected)
    # the op, and not the reference
    graphs = backend.fw_graphs + backend.bw_graphs
    assert all("torch.ops.clipfast." in graph.code for graph in graphs)


@pytest.mark.skipif(INTERPRET, reason="a graph calls the same ops wherever their kernels run")
@each_call
def test_compiles_once_for_every_batch_size(name, device):
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda fn, inputs: fn(**inputs), backend=backend, fullgraph=True, dynamic=True)
    counts = []
    for scale in (1, 2, 5):
        call = call_of(name, device, scale=scale)
        results = compiled(call.op, leaves_of(call.inputs))
        torch.testing.assert_close(results, call.op(**call.inputs))
        call.backward(results)
        # one compilation may ask twice; another batch size must not ask again
        counts.append(backend.frame_count)
    assert counts == [counts[0]] * 3


def test_compiles_once_for_every_scale(device):
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, scale: contrastive_loss(x, x, scale), backend=backend, fullgraph=True)
    x = torch.randn(7, 8, device=device)
    for scale in torch.tensor([2.5, 3.5, 4.5], device=device):
        torch.testing.assert_close(compiled(x, scale), contrastive_loss(x, x, scale))
    assert backend.frame_count == 1


@pytest.mark.skipif(not INTERPRET, reason="of the kernels' own addressing")
@each_call
def test_offsets_beyond_32_bits(name, device):
    call = call_of(name, device, torch.float16)
    expected = call.results()
    for wanted, x in call.inputs.items():
        for axis in range(x.ndim):
            torch.testing.assert_close(call.results(**{wanted: far_apart(x, axis)}), expected)
    for axis in range(call.grads[0].ndim if call.grads else 0):
        grads = tuple(far_apart(grad, axis) for grad in call.grads)
        torch.testing.assert_close(call._replace(grads=grads).results(), expected)


@each_gradient
def test_graph_can_be_used_twice(name, device):
    call = call_of(name, device)
    once = call.results()
    leaves = leaves_of(call.inputs)
    results = call.op(**leaves)
    for _ in range(2):
        call.backward(results, retain_graph=True)
    for key, leaf in leaves.items():
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, 2 * once[f"d_{key}"])


@each_call
def test_indices_of_32_bits(name, device):
    call = call_of(name, device)
    expected = call.results()
    # text_image takes 64 bits only
    small = {key: x.int() for key, x in call.inputs.items() if x.dtype == torch.int64 and key != "text_image"}
    torch.testing.assert_close(call.results(**small), expected, rtol=0, atol=0)


@each_call
def test_inputs_stay_as_they_were(name, device):
    call = call_of(name, device)
    before = {key: x.clone() for key, x in call.inputs.items()}
    gradients = [grad.clone() for grad in call.grads]
    call.results()
    assert all(torch.equal(call.inputs[key], x) for key, x in before.items())
    assert all(map(torch.equal, call.grads, gradients))


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_gradient
def test_autocast_takes_operands_down(name, device):
    call, spec = call_of(name, device), CALLS[name][0]
    leaves = leaves_of(call.inputs)
    with torch.autocast(device.type, torch.bfloat16):
        values = tuple_of(call.op(**leaves))
    # a loss stays in float32, and what is no product takes its stream as it is
    dtype = torch.bfloat16 if spec.follows_autocast else torch.float32
    assert all(value.dtype == dtype for value in values)
    sum(value.float().sum() for value in values).backward()
    assert all(x.grad.dtype == torch.float32 for x in leaves.values() if x.requires_grad)
    for value, expected in zip(values, tuple_of(call.op(**call.inputs)), strict=True):
        torch.testing.assert_close(value.float(), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.skipif(INTERPRET, reason="CPU autocast means bfloat16, which the interpreter cannot multiply")
@each_call
def test_autocast_does_not_reach_inside(name, device):
    # only the operands are converted: what follows is as exact as without autocast
    op, _, inputs, _ = call_of(name, device, torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        inside = tuple_of(op(**inputs))
    assert all(map(torch.equal, inside, tuple_of(op(**inputs))))


@each_call
def test_meta_tensors_give_shapes_and_nothing_comes_from_the_host(name, device):
    op, _, inputs, _ = call_of(name, device)
    on_meta = {key: x.to("meta") for key, x in inputs.items()}
    with OnlyMeta():
        values = tuple_of(op(**on_meta))
    assert [value.shape for value in values] == [value.shape for value in tuple_of(op(**inputs))]
