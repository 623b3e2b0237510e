"""Small cases of all ops for the tests of the verification, so that a run of its checks takes a second."""

import dataclasses
from collections.abc import Iterator

import pytest

from clipfast.kernels import configs
from clipfast.kernels.spec import DETERMINISM, NOT_INTERPRETED, Case, Draw, OpSpec, specs


def small(spec: OpSpec) -> OpSpec:
    """Return an op's specification with small cases only: its small shapes, one of them with a bias, and a check that
    repeated calls have equal bits.
    """
    without = [shape for shape in spec.small if getattr(shape, "bias", None) is False]
    with_bias = [dataclasses.replace(shape, bias=True) for shape in without[:1]]
    cases = [Case(shape, "a quick case", draws=6) for shape in (*spec.small, *with_bias)]
    return dataclasses.replace(spec, cases=[*cases, Case(spec.small[-1], "equal bits", NOT_INTERPRETED, DETERMINISM)])


SMALL = {name: small(spec) for name, spec in specs().items()}
_CALLS = {name: [spec.make(case.shape, "", Draw(empty=True)) for case in spec.cases] for name, spec in SMALL.items()}
# The names of the gradients that an op has in at least one of the ways in which it can be called.
GRADIENTS = {
    name: list(dict.fromkeys(f"d_{key}" for call in calls for key, x in call.inputs.items() if x.is_floating_point()))
    for name, calls in _CALLS.items()
    if calls[0].grads
}


@pytest.fixture(autouse=True)
def own_plans() -> Iterator[None]:
    """Forget planned calls of ops before and after each test, since plans hold the functions of a planted fault."""
    configs.forget_plans()
    yield
    configs.forget_plans()


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verification check each op at small cases."""
    for name, spec in SMALL.items():
        monkeypatch.setitem(specs(), name, spec)
