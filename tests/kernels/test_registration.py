"""Test the ops' integration with PyTorch: registration, compilation, autocast, backends, transforms, wrong tensors."""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from triton.runtime.jit import KernelInterface

from clipfast.kernels import contrastive_loss, reference, sigmoid_loss
from clipfast.kernels.backends import BACKENDS
from clipfast.verify.ops import lay_out
from clipfast.verify.rule import value_and_grads

from ..conftest import INTERPRET, ON_GPU, OnlyMeta
from .conftest import CALLS, Recorded, call_of, each_call, each_gradient, far_apart, leaves_of, tuple_of


def recorded(call, leaves):
    """Return the registered ops that a call of an op runs, forward and backward."""
    with Recorded() as mode:
        call.backward(call.op(**leaves))
    found = [(op, arguments) for op, arguments, _ in mode.calls if op.namespace == "clipfast"]
    assert found
    return found


def again(x):
    """Return an argument of a registered op as a new leaf with the same value."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def check(calls):
    """Run opcheck on registered ops; the arguments of a backward op require no gradient."""
    for op, arguments in calls:
        if "fp8" in op.name() or "quantize" in op.name():  # opcheck's other tests add up results, which fails in 8 bits
            torch.library.opcheck(op, tuple(map(again, arguments)), test_utils=("test_faketensor",))
        elif "bwd" in op.name() or INTERPRET:  # registration does not depend on the implementation that runs
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            torch.library.opcheck(op, tuple(detached), test_utils=("test_schema", "test_faketensor"))
        else:
            torch.library.opcheck(op, tuple(map(again, arguments)))


@each_call
def test_registered_ops(name, device):
    # If the strides of a result differed from those of the fake, compiled code would read wrong elements.
    call, transposed = call_of(name, device), functools.partial(lay_out, layout="transposed")
    leaves = leaves_of({key: transposed(x) for key, x in call.inputs.items()})
    check(recorded(call._replace(grads=tuple(map(transposed, call.grads))), leaves))


@each_gradient
def test_gradient_of_each_input_alone(name, device):
    # An op may leave out the gradient of a frozen parameter. The other gradients must stay the same.
    call = call_of(name, device)
    expected = call.results()
    for wanted, x in call.inputs.items():
        if x.is_floating_point():
            leaves = {key: y.detach().requires_grad_(key == wanted) for key, y in call.inputs.items()}
            calls = recorded(call, leaves)
            if not INTERPRET:
                check(calls)
            torch.testing.assert_close(leaves[wanted].grad, expected[f"d_{wanted}"], rtol=0, atol=0, msg=wanted)


@each_call
def test_an_eager_call_computes_what_the_registered_op_computes(name, device):
    call = call_of(name, device, torch.float16)
    with Recorded():
        expected = call.results()
    torch.testing.assert_close(call.results(), expected, rtol=0, atol=0)


@each_call
def test_values_that_the_memory_does_not_hold(name, device):
    """The imaginary part of a conjugate is a view of the original memory, whose sign PyTorch turns when it is read."""
    call = call_of(name, device)
    negated = {key: torch.complex(x, -x).conj().imag for key, x in call.inputs.items() if x.is_floating_point()}
    assert all(x.is_neg() for x in negated.values())
    torch.testing.assert_close(call.results(**negated), call.results(), rtol=0, atol=0)
    if call.grads:
        gradients = tuple(torch.complex(grad, -grad).conj().imag for grad in call.grads)
        torch.testing.assert_close(call._replace(grads=gradients).results(), call.results(), rtol=0, atol=0)


@each_gradient
def test_a_call_is_recomputed_under_a_mode(name, native):
    """A mode may see only the recomputation of a checkpointed call, so calls must save the same tensors without one."""
    function, tensors = split(call_of(name, native))
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    result = checkpoint(function, *leaves, use_reentrant=False)
    with Recorded():
        found = torch.autograd.grad(result.sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@each_gradient
def test_batched_gradients(name, native):
    """``is_grads_batched`` vectorises a backward pass without a transform of torch.func."""
    function, tensors = split(call_of(name, native))
    leaves = [x.requires_grad_() for x in tensors]
    result = function(*leaves)
    gradient = torch.randn_like(result)
    expected = torch.autograd.grad(result, leaves, gradient, retain_graph=True)
    both = torch.autograd.grad(result, leaves, torch.stack([gradient, gradient]), is_grads_batched=True)
    for found, one in zip(both, expected, strict=True):
        torch.testing.assert_close(found[1], one, rtol=0, atol=0)


@pytest.mark.parametrize("loss", [contrastive_loss, functools.partial(sigmoid_loss, logit_bias=-3.0)])
def test_numbers_of_other_kinds(loss, device):
    image, text = torch.randn(2, 7, 8, device=device)
    expected = loss(image, text, 5.0, offset=1)
    for offset in (np.int64(1), torch.tensor(1)):
        torch.testing.assert_close(loss(image, text, 5.0, offset=offset), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"normalize must be a bool, got str"):
        loss(image, text, 5.0, normalize="yes")


@each_gradient
def test_gradcheck(name):
    # the kernels compute in float32; gradcheck needs the float64 of the CPU path
    call = call_of(name, dtype=torch.float64)
    leaves = leaves_of(call.inputs)
    assert torch.autograd.gradcheck(lambda *xs: call.op(**dict(zip(leaves, xs, strict=True))), [*leaves.values()])


@each_call
def test_compiles_without_a_break(name, native):
    call = call_of(name, native)
    expected = call.results()
    torch.compiler.reset()
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(lambda **kwargs: call.op(**kwargs), backend=backend, fullgraph=True)
    torch.testing.assert_close(value_and_grads(compiled, call.inputs, call.grads), expected)
    # The graphs contain the op, not the reference.
    graphs = backend.fw_graphs + backend.bw_graphs
    assert all("torch.ops.clipfast." in graph.code for graph in graphs)


@each_call
def test_compiles_once_for_every_batch_size(name, native):
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda fn, inputs: fn(**inputs), backend=backend, fullgraph=True, dynamic=True)
    counts = []
    for scale in (1, 2, 5):
        call = call_of(name, native, scale=scale)
        results = compiled(call.op, leaves_of(call.inputs))
        torch.testing.assert_close(results, call.op(**call.inputs))
        call.backward(results)
        # One compilation may call the backend twice. Another batch size must not call it again.
        counts.append(backend.frame_count)
    assert counts == [counts[0]] * 3


def test_compiles_once_for_every_scale(native):
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, scale: contrastive_loss(x, x, scale), backend=backend, fullgraph=True)
    x = torch.randn(7, 8, device=native)
    for scale in torch.tensor([2.5, 3.5, 4.5], device=native):
        torch.testing.assert_close(compiled(x, scale), contrastive_loss(x, x, scale))
    assert backend.frame_count == 1


@each_call
def test_offsets_beyond_32_bits(name, interpreted):
    call = call_of(name, interpreted, torch.float16)
    expected = call.results()
    for axis in range(max(x.ndim for x in (*call.inputs.values(), *call.grads))):
        far = {key: far_apart(x, axis) for key, x in call.inputs.items() if axis < x.ndim}
        grads = tuple(far_apart(grad, axis) if axis < grad.ndim else grad for grad in call.grads)
        torch.testing.assert_close(call._replace(grads=grads).results(**far), expected)


@each_call
def test_inputs_stay_as_they_were_and_the_graph_can_be_used_twice(name, device):
    call = call_of(name, device)
    before = {key: x.clone() for key, x in call.inputs.items()}
    gradients = [grad.clone() for grad in call.grads]
    once = call.results()
    leaves = leaves_of(call.inputs)
    results = call.op(**leaves)
    for _ in range(2 if call.grads else 0):
        call.backward(results, retain_graph=True)
    assert all(torch.equal(call.inputs[key], x) for key, x in before.items())
    assert all(map(torch.equal, call.grads, gradients))
    assert any(x.requires_grad for x in tuple_of(results)) == bool(call.grads)
    for key, leaf in leaves.items():
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, 2 * once[f"d_{key}"])


@each_call
def test_indices_of_32_bits(name, device):
    call = call_of(name, device)
    # The input text_image of retrieval_ranks takes int64 only.
    small = {key: x.int() for key, x in call.inputs.items() if x.dtype == torch.int64 and key != "text_image"}
    if small:
        torch.testing.assert_close(call.results(**small), call.results(), rtol=0, atol=0)


@each_call
def test_autocast_takes_operands_down(name, native):
    call, spec = call_of(name, native), CALLS[name][0]
    leaves = leaves_of(call.inputs)
    half = call_of(name, native, torch.bfloat16).inputs
    with torch.autocast(native.type, torch.bfloat16):
        values, inside = tuple_of(call.op(**leaves)), tuple_of(call.op(**half))
    # Autocast converts only the operands, so the results equal those for 16-bit operands without autocast.
    assert all(map(torch.equal, inside, tuple_of(call.op(**half))))
    if call.grads:
        # A loss stays in float32, and an op without a matrix product keeps the dtype of its input.
        dtype = torch.bfloat16 if spec.follows_autocast else torch.float32
        assert all(value.dtype == dtype for value in values)
        sum(value.float().sum() for value in values).backward()
        assert all(x.grad.dtype == torch.float32 for x in leaves.values() if x.requires_grad)
        for value, expected in zip(values, tuple_of(call.op(**call.inputs)), strict=True):
            torch.testing.assert_close(value.float(), expected, rtol=2e-2, atol=5e-2)


@each_call
def test_meta_tensors_give_shapes_and_nothing_comes_from_the_host(name, native):
    op, _, inputs, _ = call_of(name, native)
    on_meta = {key: x.to("meta") for key, x in inputs.items()}
    with OnlyMeta():
        values = tuple_of(op(**on_meta))
    assert [value.shape for value in values] == [value.shape for value in tuple_of(op(**inputs))]


class ReferenceRanError(Exception):
    """The error that a test raises if a function of the reference is called."""


@pytest.mark.parametrize("backend", BACKENDS)
@each_call
def test_backend(name, backend, device, monkeypatch):
    def refuse(*args, **kwargs):
        """Fail if the reference runs in place of the registered op."""
        raise ReferenceRanError

    for key, value in vars(reference).items():
        if getattr(value, "__module__", None) == reference.__name__ and not key.startswith("_"):
            monkeypatch.setattr(reference, key, refuse)
    started, original = [], KernelInterface.__getitem__
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: started.append(grid) or original(self, grid))
    call = call_of(name, device)
    has_triton = INTERPRET or ON_GPU
    if backend == "torch":
        with pytest.raises(ReferenceRanError):
            call.op(**call.inputs, backend=backend)
    elif backend == "triton" and not has_triton:
        with pytest.raises(RuntimeError, match=f"^{name.split()[0]}: backend='triton' .*TRITON_INTERPRET=1"):
            call.op(**call.inputs, backend=backend)
    else:
        call.op(**call.inputs, backend=backend)
    assert bool(started) == (has_triton and backend != "torch")


WARNING = "torch.func and forward-mode derivatives take the PyTorch reference"


def split(call):
    """Return an op as a function of its inputs with gradients only, and these inputs."""
    floats = {name: x.detach() for name, x in call.inputs.items() if x.is_floating_point()}
    others = {name: x for name, x in call.inputs.items() if name not in floats}

    def function(*tensors, **options):
        """Call a registered op with its floating inputs, and return all results as one vector."""
        results = tuple_of(call.op(**dict(zip(floats, tensors, strict=True)), **others, **options))
        return torch.cat([result.flatten() for result in results])

    return function, tuple(floats.values())


@each_gradient
def test_forward_mode_takes_the_reference(name):
    function, tensors = split(call_of(name, dtype=torch.float64))
    tangents = tuple(map(torch.randn_like, tensors))
    with pytest.warns(UserWarning, match=f"^{name.split()[0]}: {WARNING}"):
        _, found = torch.func.jvp(function, tensors, tangents)
    step = 1e-6
    ends = [
        function(*(x + sign * step * t for x, t in zip(tensors, tangents, strict=True)), backend="torch")
        for sign in (1, -1)
    ]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings(f"ignore:.*{WARNING}")
@each_gradient
def test_torch_func_takes_the_reference(name):
    function, tensors = split(call_of(name, dtype=torch.float64))
    gradient = torch.func.grad(lambda *xs: function(*xs).sum(), tuple(range(len(tensors))))
    torch.compiler.reset()
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    found = gradient(*tensors), compiled(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    torch.testing.assert_close(found, (expected, expected))


@pytest.mark.parametrize("is_squared", [False, True])
@each_gradient
def test_second_derivative_is_refused(name, is_squared, native):
    function, tensors = split(call_of(name, native))
    leaves = [x.requires_grad_() for x in tensors]

    def penalised_gradient(of, by, **options):
        """Return the gradient by one input of a sum and a penalty on its first gradient of another input."""
        found = function(*leaves, **options)  # the gradient of its sum is a constant
        total = (found.pow(2) if is_squared else found).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)[of]
        return torch.autograd.grad(total + first.pow(2).sum(), leaves[by])

    if is_squared:
        with pytest.raises(NotImplementedError, match=r"has no derivative.*backend='torch'"):
            penalised_gradient(0, 0)
    # The first call is under a mode. The layout of the third one is known from the second.
    for way in (Recorded(), contextlib.nullcontext(), contextlib.nullcontext()):
        for places in itertools.product(range(len(leaves)), repeat=2):
            found = None
            with way, contextlib.suppress(NotImplementedError):
                found = penalised_gradient(*places)
            if found is not None:  # The second derivative is 0, as in an op that is linear.
                torch.testing.assert_close(found, penalised_gradient(*places, backend="torch"), rtol=1e-3, atol=1e-5)


@each_call
def test_triton_has_no_transform(name, interpreted):
    # Without the interpreter, backend='triton' is refused for another reason, or runs on a GPU.
    function, tensors = split(call_of(name, interpreted))
    with pytest.raises(RuntimeError, match=r"backend='triton' has no forward-mode derivative and no torch\.func"):
        torch.func.jvp(lambda *xs: function(*xs, backend="triton"), tensors, tensors)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("name", "argument"), [(name, key) for name in CALLS for key in call_of(name).inputs])
def test_wrong_tensor(name, argument, backend):
    call, op = call_of(name), name.split()[0]
    x = call.inputs[argument]
    of_another_kind = x.to(torch.int16 if x.is_floating_point() else torch.complex64)
    for wrong, error, message in (
        ([x], TypeError, f"{argument} must be .*[Tt]ensor.*, got list"),
        (of_another_kind, TypeError, f"{argument} must .*, got (int16|complex64)"),
        *((x.to("meta"), ValueError, r"on (meta|cpu).* on (cpu|meta)") for _ in list(call.inputs)[1:2]),
    ):
        with pytest.raises(error, match=f"^{op}: .*{message}"):
            call.op(**call.inputs | {argument: wrong}, backend=backend)


@each_call
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match=f"^{name.split()[0]}: backend must be one of .*, got 'cuda'"):
        call_of(name).op(**call_of(name).inputs, backend="cuda")


@each_call
def test_interpreter_refuses_dtypes_that_it_would_get_wrong(name, interpreted):
    for dtype, message in ((torch.bfloat16, "is bfloat16, which .* as raw bits"), (torch.float64, "is float64")):
        call = call_of(name, interpreted, dtype)
        with pytest.raises(TypeError, match=f"^{name.split()[0]}: .*{message}"):
            call.op(**call.inputs)
