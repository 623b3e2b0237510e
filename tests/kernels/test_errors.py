"""Bad input that every op refuses, with an error that names the op, the argument, and what came.

What only one op can be given wrongly stands in that op's own tests.
"""

import pytest
import torch

from ..conftest import INTERPRET
from .conftest import CALLS, call_of, each_call

CPU = torch.device("cpu")
ARGUMENTS = [(name, argument) for name in CALLS for argument in call_of(name, torch.float32, CPU).inputs]
each_argument = pytest.mark.parametrize(("name", "argument"), ARGUMENTS)


def refused(name, argument, wrong, error, message, **options):
    function, inputs, _ = call_of(name, torch.float32, CPU)
    with pytest.raises(error, match=f"^{name.split()[0]}: .*{message}"):
        function(**(inputs | {argument: wrong(inputs[argument])}), **options)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@each_argument
def test_a_list_in_place_of_a_tensor(name, argument, backend):
    refused(name, argument, lambda x: [x], TypeError, f"{argument} must be .*[Tt]ensor.*, got list", backend=backend)


@each_argument
def test_another_kind_of_number(name, argument):
    def other(x):
        return x.to(torch.int16 if x.is_floating_point() else torch.complex64)

    refused(name, argument, other, TypeError, f"{argument} must .*, got (int16|complex64)")


@pytest.mark.parametrize(
    ("name", "argument"), [pair for pair in ARGUMENTS if len(call_of(pair[0], torch.float32, CPU).inputs) > 1]
)
def test_another_device(name, argument):
    refused(name, argument, lambda x: x.to("meta"), ValueError, r"on (meta|cpu).* on (cpu|meta)")


@each_call
def test_an_unknown_backend(name):
    function, inputs, _ = call_of(name, torch.float32, CPU)
    message = "backend must be one of auto, triton, torch, got 'cuda'"
    with pytest.raises(ValueError, match=f"^{name.split()[0]}: {message}"):
        function(**inputs, backend="cuda")


@pytest.mark.skipif(not INTERPRET, reason="of the interpreter")
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.bfloat16, "is bfloat16, which Triton's interpreter multiplies as raw bits"),
        (torch.float64, "is float64, which only the CPU path"),
    ],
)
@each_call
def test_interpreter_refuses_what_it_would_get_wrong(name, dtype, message):
    function, inputs, _ = call_of(name, dtype, CPU)
    with pytest.raises(TypeError, match=f"^{name.split()[0]}: .*{message}"):
        function(**inputs)
