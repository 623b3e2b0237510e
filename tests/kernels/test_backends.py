"""Each op runs on the backend that it is asked for."""

import pytest
import torch
from triton.runtime.jit import KernelInterface

from clipfast.kernels import reference

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


@each_call
def test_torch_is_the_reference(name, device, kernels_started):
    function, inputs, _ = call_of(name, torch.float32, device)
    with pytest.raises(ReferenceRanError):
        function(**inputs, backend="torch")
    assert kernels_started == []


@pytest.mark.parametrize("backend", ["auto", "triton"])
@each_call
def test_triton_runs_where_it_can(name, backend, device, kernels_started):
    function, inputs, _ = call_of(name, torch.float32, device)
    has_triton = INTERPRET or ON_GPU
    if backend == "triton" and not has_triton:
        message = r"backend='triton' cannot run on a cpu tensor.*TRITON_INTERPRET=1"
        with pytest.raises(RuntimeError, match=f"^{name.split()[0]}: {message}"):
            function(**inputs, backend=backend)
        return
    function(**inputs, backend=backend)
    assert bool(kernels_started) == has_triton
