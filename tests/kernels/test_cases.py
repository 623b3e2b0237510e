"""Check every case of every op's specification by the rule of ``clipfast.verify``, on the leg that the tests run on."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from clipfast.kernels import launch
from clipfast.kernels.contrastive import operands
from clipfast.kernels.spec import CUDA, DETERMINISM, EXPANDED, EXTREME, Case, OpSpec, specs
from clipfast.verify.ops import TORCH_DTYPES, verify_case
from clipfast.verify.report import FAIL

from ..conftest import DTYPES, INTERPRET, LEG
from .conftest import needs_sanitizer

VERIFY_LEG = CUDA if LEG == "gpu" else LEG
NAMES = [name for name, dtype in TORCH_DTYPES.items() if dtype in DTYPES]
# The tests check a case on a CPU if the reference's largest tensor has at most this many elements. "clipfast verify"
# checks larger cases too.
MOST_ELEMENTS = 2**13 if INTERPRET else 2**20
# The limit for float16 on a CPU, where PyTorch's own float16, whose error is the yardstick, takes seconds for larger
# cases. In bfloat16, a CPU checks cases up to MOST_ELEMENTS.
MOST_HALF_ELEMENTS = 2**17


def is_slow(case: Case, dtype: str) -> bool:
    """Return whether only ``--slow`` checks a case on the leg of this process.

    The interpreter would take minutes for all cases. Without ``--slow`` it leaves out those that other tests cover: the
    cases that the sanitizer and ``test_case_of_several_tiles`` run; layouts, since ``test_offsets_beyond_32_bits``
    gives each input strides of its own; and float16 except for extreme values, since ``test_case_of_several_tiles``
    runs in float16.
    """
    if not INTERPRET:
        is_half = LEG == "cpu" and dtype == "float16" and case.check != EXTREME
        return case.shape.elements > (MOST_HALF_ELEMENTS if is_half else MOST_ELEMENTS)
    if case.quick:
        return dtype == "float16" and case.check != EXTREME
    is_covered = case.sanitize or case.layout not in ("", EXPANDED)
    return dtype == "float16" or is_covered or case.shape.elements > MOST_ELEMENTS


def cases(
    dtypes: Sequence[str], wanted: Callable[[Case], bool], slow: Callable[[Case, str], bool] = is_slow
) -> list[object]:
    """Return the cases for which ``wanted`` is true, each with each dtype, as parameters of a test."""
    found = []
    for spec in specs().values():
        for number, case in enumerate(spec.cases):
            for dtype in dtypes if wanted(case) else ():
                if VERIFY_LEG != "cpu" or dtype not in case.slow:
                    marks = [pytest.mark.long] * (not case.quick) + [pytest.mark.slow] * slow(case, dtype)
                    label = f"{spec.name}-{number} {case.name}-{dtype}"
                    found.append(pytest.param(spec, case, dtype, id=label, marks=marks))
    return found


def hold(spec: OpSpec, case: Case, dtype: str, *, draws: int | None = None) -> None:
    """Check a case of an op by the rule and fail with the text of the report."""
    case = dataclasses.replace(case, draws=draws or case.draws)
    rows = verify_case(spec, VERIFY_LEG, case, dtype, quick=True)
    assert rows
    failed = [f"{row.output}: {row.reason}" for row in rows if row.verdict == FAIL]
    assert not failed, f"{case.why}: {'; '.join(failed)}"


@pytest.mark.parametrize(("spec", "case", "dtype"), cases(NAMES, lambda case: VERIFY_LEG in case.legs))
def test_case(spec, case, dtype, device, request):
    if case.check == DETERMINISM:
        request.getfixturevalue("two_threads")  # with several threads, sums could be added in any order
    hold(spec, case, dtype)


def of_several_tiles(*dtypes: str) -> pytest.MarkDecorator:
    """Parametrise over the cases that become several small tiles; only ``--slow`` checks them in float32."""
    found = cases(dtypes, lambda case: case.sanitize, lambda case, dtype: dtype == "float32")
    return pytest.mark.parametrize(("spec", "case", "dtype"), found)


@of_several_tiles("float32", "float16")
def test_case_of_several_tiles(spec, case, dtype, interpreted, monkeypatch):
    if dtype == "float16":
        # sm_90 loads 16-bit tiles through tensor descriptors; on few multiprocessors, a program takes several tiles
        monkeypatch.setattr(launch, "CPU_ARCH", 90)
        monkeypatch.setattr(operands, "RECORDED_MULTIPROCESSORS", 3)
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
class TestSanitized:
    """Run the kernels under ttsem, which executes Triton's IR on the CPU and checks bounds, races and bfloat16."""

    @of_several_tiles("bfloat16", "float32")
    def test_case(self, spec, case, dtype, sanitizer):
        with spec.small_tiles(TORCH_DTYPES[dtype]):
            hold(spec, case, dtype, draws=1)
