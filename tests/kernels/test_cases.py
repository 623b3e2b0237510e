"""Check every case of every op's specification by the rule of ``clipfast.verify``, on the leg that the tests run on."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from clipfast.kernels import launch
from clipfast.kernels.contrastive import launches as contrastive_launches
from clipfast.kernels.spec import CUDA, DETERMINISM, Case, OpSpec, specs
from clipfast.verify.ops import TORCH_DTYPES, verify_case
from clipfast.verify.report import FAIL

from ..conftest import DTYPES, INTERPRET, LEG
from .conftest import needs_sanitizer

VERIFY_LEG = CUDA if LEG == "gpu" else LEG
NAMES = [name for name, dtype in TORCH_DTYPES.items() if dtype in DTYPES]
# The tests check a case on a CPU if the reference's largest tensor has at most this many elements. "clipfast verify"
# checks larger cases too.
MOST_ELEMENTS = 2**14 if INTERPRET else 2**20


def cases(dtypes: Sequence[str], wanted: Callable[[Case], bool]) -> list[object]:
    """Return the cases for which ``wanted`` is true, each with each dtype, as parameters of a test."""
    found = []
    for spec in specs().values():
        for number, case in enumerate(spec.cases):
            is_slow = case.shape.elements > MOST_ELEMENTS and not (INTERPRET and case.quick)
            marks = [pytest.mark.long] * (not case.quick) + [pytest.mark.slow] * is_slow
            for dtype in dtypes if wanted(case) else ():
                if VERIFY_LEG != "cpu" or dtype not in case.slow:
                    label = f"{spec.name}-{number} {case.name}-{dtype}"
                    found.append(pytest.param(spec, case, dtype, id=label, marks=marks))
    return found


def hold(spec: OpSpec, case: Case, dtype: str, *, draws: int | None = None) -> None:
    """Check a case by the rule and fail with the text of the report; ``draws`` replaces the first number of draws."""
    case = dataclasses.replace(case, draws=draws or case.draws)
    rows = verify_case(spec, VERIFY_LEG, case, dtype, quick=True)
    assert rows
    failed = [f"{row.output}: {row.reason}" for row in rows if row.verdict == FAIL]
    assert not failed, f"{case.why}: {'; '.join(failed)}"


@pytest.mark.parametrize(("spec", "case", "dtype"), cases(NAMES, lambda case: VERIFY_LEG in case.legs))
def test_case(spec, case, dtype, device, request):
    if INTERPRET and dtype == "float16" and not (case.quick or request.config.getoption("--slow")):
        pytest.skip("the interpreter takes minutes, and float32 says enough")
    if case.check == DETERMINISM:
        request.getfixturevalue("two_threads")  # with several threads, sums could be added in any order
    hold(spec, case, dtype)


@pytest.mark.parametrize(("spec", "case", "dtype"), cases(["float32", "float16"], lambda case: case.sanitize))
def test_case_of_several_tiles(spec, case, dtype, interpreted, monkeypatch):
    if dtype == "float16":
        # sm_90 loads 16-bit tiles through tensor descriptors; on few multiprocessors, a program takes several tiles
        monkeypatch.setattr(launch, "CPU_ARCH", 90)
        monkeypatch.setattr(contrastive_launches, "RECORDED_MULTIPROCESSORS", 3)
    with spec.small_tiles(TORCH_DTYPES[dtype]):
        hold(spec, case, dtype, draws=1)


@pytest.mark.parametrize("spec", specs().values(), ids=specs())
def test_specification_is_whole(spec):
    assert len({(case.name, case.check, case.legs) for case in spec.cases}) == len(spec.cases)
    assert all(case.why and case.legs for case in spec.cases)
    assert sum(case.quick for case in spec.cases) >= 3
    assert any(case.sanitize for case in spec.cases)
    assert {"cpu", "cuda"} == set(spec.bench)


@needs_sanitizer
@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [
        pytest.param(*one.values, id=one.id, marks=[*one.marks, *[pytest.mark.slow] * (one.values[2] == "float32")])
        for one in cases(["bfloat16", "float32"], lambda case: case.sanitize)
    ],
)
class TestSanitized:
    """Run the kernels under ttsem, which executes Triton's IR on the CPU and checks bounds, races and bfloat16."""

    def test_case(self, spec, case, dtype, sanitizer):
        with spec.small_tiles(TORCH_DTYPES[dtype]):
            hold(spec, case, dtype, draws=1)
