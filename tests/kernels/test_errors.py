"""Bad input that every op refuses, with an error that names the op, the argument, and what came.

What only one op can be given wrongly stands in that op's own tests.
"""

import pytest
import torch

from ..conftest import INTERPRET
from .conftest import CALLS, call_of, each_call

ARGUMENTS = [(name, argument) for name in CALLS for argument in call_of(name).inputs]


def of_another_kind(x):
    return x.to(torch.int16 if x.is_floating_point() else torch.complex64)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda x: [x], TypeError, "{argument} must be .*[Tt]ensor.*, got list"),
        (of_another_kind, TypeError, "{argument} must .*, got (int16|complex64)"),
        (lambda x: x.to("meta"), ValueError, r"on (meta|cpu).* on (cpu|meta)"),
    ],
    ids=["list", "another kind", "another device"],
)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_wrong_tensor(name, argument, wrong, error, message, backend):
    call = call_of(name)
    if error is ValueError and len(call.inputs) == 1:
        pytest.skip("there is no other tensor on another device")
    with pytest.raises(error, match=f"^{name.split()[0]}: .*{message.format(argument=argument)}"):
        call.op(**call.inputs | {argument: wrong(call.inputs[argument])}, backend=backend)


@each_call
def test_an_unknown_backend(name):
    call = call_of(name)
    message = "backend must be one of auto, triton, torch, got 'cuda'"
    with pytest.raises(ValueError, match=f"^{name.split()[0]}: {message}"):
        call.op(**call.inputs, backend="cuda")


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
    call = call_of(name, dtype=dtype)
    with pytest.raises(TypeError, match=f"^{name.split()[0]}: .*{message}"):
        call.op(**call.inputs)
