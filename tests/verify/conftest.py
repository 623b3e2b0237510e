"""Small cases, so that a run of the checks takes a second."""

import dataclasses

import pytest

from clipfast.kernels.spec import ACCURACY, DETERMINISM, NOT_INTERPRETED, Case, Draw, OpSpec, specs


def small(spec: OpSpec) -> OpSpec:
    """The op at its small shapes and at one of its quick cases, and bitwise repeats of one of them."""
    quick = [case.shape for case in spec.cases if case.quick and case.check == ACCURACY and not case.cancels]
    shapes = dict.fromkeys((*spec.small, min(quick, key=lambda shape: shape.elements)))
    cases = [Case(shape, "small", draws=6) for shape in shapes]
    return dataclasses.replace(spec, cases=[*cases, Case(spec.small[-1], "again", NOT_INTERPRETED, DETERMINISM)])


SMALL = {name: small(spec) for name, spec in specs().items()}
_CALLS = {
    name: [spec.make(case.shape, "", Draw(empty=True)) for case in spec.cases[:-1]] for name, spec in SMALL.items()
}
# The gradients that an op has, in any of the ways in which it can be called.
GRADIENTS = {
    name: list(dict.fromkeys(f"d_{key}" for call in calls for key, x in call.inputs.items() if x.is_floating_point()))
    for name, calls in _CALLS.items()
    if calls[0].grads
}


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each op at small cases."""
    for name, spec in SMALL.items():
        monkeypatch.setitem(specs(), name, spec)
