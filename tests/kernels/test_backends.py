"""Each op runs on the backend that it is asked for."""

import pytest
from triton.runtime.jit import KernelInterface

from clipfast.kernels import reference
from clipfast.kernels.backends import BACKENDS

from ..conftest import INTERPRET, ON_GPU
from .conftest import call_of, each_call


class ReferenceRanError(Exception):
    """A function of the reference was called."""


@pytest.fixture
def kernels_started(monkeypatch):
    """A list with an entry for each kernel that was started."""
    started = []
    original = KernelInterface.__getitem__
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda self, grid: started.append(grid) or original(self, grid))
    return started


@pytest.fixture(autouse=True)
def reference_raises(monkeypatch):
    def refuse(*args, **kwargs):
        raise ReferenceRanError

    for name, value in vars(reference).items():
        if getattr(value, "__module__", None) == reference.__name__ and not name.startswith("_"):
            monkeypatch.setattr(reference, name, refuse)


@pytest.mark.parametrize("backend", BACKENDS)
@each_call
def test_backend(name, backend, device, kernels_started):
    call = call_of(name, device)
    has_triton = INTERPRET or ON_GPU
    if backend == "torch":
        with pytest.raises(ReferenceRanError):
            call.op(**call.inputs, backend=backend)
    elif backend == "triton" and not has_triton:
        message = r"backend='triton' cannot run on a cpu tensor.*TRITON_INTERPRET=1"
        with pytest.raises(RuntimeError, match=f"^{name.split()[0]}: {message}"):
            call.op(**call.inputs, backend=backend)
    else:
        call.op(**call.inputs, backend=backend)
    assert bool(kernels_started) == (has_triton and backend != "torch")
