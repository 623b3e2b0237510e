"""Derivatives that the registered ops do not have: the reference computes them, or an error says that they lack."""

import pytest
import torch

from ..conftest import INTERPRET, LEG
from .conftest import call_of, each_call, each_gradient, tuple_of

WARNING = "torch.func and forward-mode derivatives take the PyTorch reference"


def split(call):
    """The function of the inputs that have gradients, and these inputs."""
    floats = {name: x.detach() for name, x in call.inputs.items() if x.is_floating_point()}
    others = {name: x for name, x in call.inputs.items() if name not in floats}

    def function(*tensors, **options):
        results = tuple_of(call.op(**dict(zip(floats, tensors, strict=True)), **others, **options))
        return torch.cat([result.flatten() for result in results])

    return function, tuple(floats.values())


@pytest.mark.skipif(LEG != "cpu", reason="whatever the device, it is the reference that runs")
class TestReference:
    @each_gradient
    def test_forward_mode(self, name, device):
        function, tensors = split(call_of(name, device, torch.float64))
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
    @pytest.mark.parametrize("compiled", [False, True])
    @each_gradient
    def test_grad(self, name, compiled, device):
        function, tensors = split(call_of(name, device, torch.float64))
        gradient = torch.func.grad(lambda *xs: function(*xs).sum(), tuple(range(len(tensors))))
        if compiled:
            torch.compiler.reset()
            gradient = torch.compile(gradient, backend="aot_eager", fullgraph=True)
        found = gradient(*tensors)
        leaves = [x.requires_grad_() for x in tensors]
        expected = torch.autograd.grad(function(*leaves).sum(), leaves)
        torch.testing.assert_close(found, expected)


@each_gradient
def test_second_derivative_is_refused(name, device):
    function, tensors = split(call_of(name, device))
    leaves = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(function(*leaves).pow(2).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"has no derivative.*backend='torch'"):
        sum(x.sum() for x in first).backward()


@pytest.mark.skipif(not INTERPRET, reason="elsewhere, backend='triton' is refused for another reason, or runs on a GPU")
@each_call
def test_triton_has_no_transform(name, device):
    function, tensors = split(call_of(name, device))
    with pytest.raises(RuntimeError, match=r"backend='triton' has no forward-mode derivative and no torch\.func"):
        torch.func.jvp(lambda *xs: function(*xs, backend="triton"), tensors, tensors)
