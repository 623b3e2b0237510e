"""Verify the ops: the errors of each case are judged by the rule, or its results must have the same bits each time."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.dtypes import DTYPES, dtype_name
from ..kernels.spec import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, Call, Case, Draw, OpSpec
from .context import exact_float32, poisoned
from .options import SANITIZER
from .report import FAIL, PASS, SKIP, CheckResult, results_of
from .rule import GRADIENT, KINDS, Judgement, cast_floats, judge_fairly, value_and_grads
from .rule import Draw as DrawResults

TORCH_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
# The truth (the reference's exact result) is computed in float64 if the largest tensor has at most this many elements;
# eight tensors of that size exist at once. Otherwise it is computed in float32, which can only judge half precision.
FLOAT64_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}
# A case that fails with a few random inputs is judged again, with up to MANY_DRAWS of them and at most MANY_ELEMENTS
# elements in all.
MANY_DRAWS, MANY_ELEMENTS = 32, 2**25
MOST_DRAWS = {INTERPRETER: 3, SANITIZER: 1}
REPEATS = {CPU: 5, CUDA: 100, INTERPRETER: 2}
QUICK_REPEATS = {CPU: 3, CUDA: 20, INTERPRETER: 2}


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of the verification: ``rows`` runs it; if it raises an error, ``template`` becomes a failed result."""

    template: CheckResult
    rows: Callable[[], list[CheckResult]]


def verify_case(spec: OpSpec, leg: str, case: Case, dtype: str, *, quick: bool) -> list[CheckResult]:
    """Check one case of an op on a leg, in a dtype such as "float32", and return a result for each output."""
    template = CheckResult(spec.name, leg, case.check, case.name, dtype, why=case.why)
    device = "cuda" if leg == CUDA else "cpu"
    if case.check == DETERMINISM:
        repeats = (QUICK_REPEATS if quick else REPEATS)[leg]
        return _repeat(template, spec, inputs_of(spec, case, TORCH_DTYPES[dtype], device), repeats)
    return _hold_to_rule(template, spec, case, TORCH_DTYPES[dtype], device)


def _hold_to_rule(
    template: CheckResult, spec: OpSpec, case: Case, dtype: torch.dtype, device: str
) -> list[CheckResult]:
    """Check one case of an op by the rule for errors, and return a result for each output."""
    truth_dtype = torch.float32 if case.shape.elements > FLOAT64_ELEMENTS[device] else torch.float64
    if dtype == truth_dtype:
        reason = f"{case.shape.elements:.1e} elements: a float64 truth does not fit; a float32 one cannot judge float32"
        return [dataclasses.replace(template, verdict=SKIP, reason=reason)]

    overwritten: dict[str, None] = {}

    def draw(number: int) -> DrawResults:
        """Draw random inputs of the case, and return the op's results, PyTorch's at the same dtype, and the truth."""
        call, again = (inputs_of(spec, case, dtype, device, number) for _ in range(2))
        with poisoned():
            ours = _results(spec.op, call)
        overwritten.update({name: None for name, x in call.inputs.items() if not _equal(x, again.inputs[name])})
        call = again
        widened = dataclasses.replace(call, inputs=cast_floats(call.inputs, truth_dtype))
        with exact_float32():
            truth = _results(spec.reference, widened)
            same_dtype = _results(spec.reference, call)
            if case.cancels and spec.fused is not None:
                fused = _results(spec.fused, call)
                same_dtype = {name: _less_exact(same_dtype[name], fused[name], truth[name]) for name in truth}
        return ours, same_dtype, truth

    few = min(case.draws, MOST_DRAWS.get(template.leg, case.draws))
    many = max(few, min(MANY_DRAWS, MANY_ELEMENTS // max(case.shape.elements, 1)))
    judgements, draws = judge_fairly(draw, few, many)
    if case.cancels and spec.fused is None and not all(judgement.passed for judgement in judgements.values()):
        calls = (inputs_of(spec, dataclasses.replace(case, layout=""), dtype, device, n) for n in range(len(draws)))
        widened = (dataclasses.replace(call, inputs=cast_floats(call.inputs, truth_dtype)) for call in calls)
        usual = [_results(spec.reference, call) for call in widened]
        judgements = {name: _with_floor(name, judgement, draws, usual) for name, judgement in judgements.items()}
    if case.check == EXTREME:
        judgements = {name: _finite(name, judgement, draws) for name, judgement in judgements.items()}
    if overwritten:
        judgements["inputs"] = Judgement(fault=f"the call overwrote {', '.join(overwritten)}")
    return results_of(dataclasses.replace(template, truth=dtype_name(truth_dtype)), judgements)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two inputs of a verified op hold the same values, where NaN equals NaN."""
    return bool((one.eq(other) | (one.ne(one) & other.ne(other))).all())


def _results(function: Callable[..., object], call: Call) -> dict[str, Tensor]:
    """Run the verified op or its reference forward and backward, and return its results and gradients by name."""
    return value_and_grads(functools.partial(function, **call.options), call.inputs, call.grads)


def _less_exact(one: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """Return the less exact of two results of PyTorch for an op: the one with the larger maximum error."""
    errors = [(result.double() - truth).abs().max() for result in (one, other)]
    return one if errors[0] >= errors[1] else other


def _with_floor(
    name: str, judgement: Judgement, draws: Sequence[DrawResults], usual: Sequence[Mapping[str, Tensor]]
) -> Judgement:
    """Return the judgement of an output, with a floor under the allowed error if the truth is zero up to rounding.

    PyTorch's own error may vanish there, and is then no yardstick. The floor is ``GRADIENT`` units in the last place of
    the size that the output has in ``usual``, the exact results of as many draws with random upstream gradients.
    """
    if judgement.passed or judgement.fault:
        return judgement
    truth, size = (torch.cat([results[name].flatten() for results in side]) for side in ([t for *_, t in draws], usual))
    unit = torch.finfo(draws[0][0][name].dtype).eps
    if not truth.abs().max() <= unit * size.abs().max():
        return judgement
    floors = {kind: GRADIENT * unit * reduce(size) for kind, reduce in KINDS.items()}
    figures = (dataclasses.replace(f, allowed=max(f.allowed, floors[f.kind])) for f in judgement.figures)
    return dataclasses.replace(judgement, figures=tuple(figures), note="exactly zero: held to its usual size")


def _finite(name: str, judgement: Judgement, draws: Sequence[DrawResults]) -> Judgement:
    """Return the judgement of an output, which fails if the output is not finite in one of the draws."""
    if judgement.fault or all(ours[name].isfinite().all() for ours, _, _ in draws):
        return judgement
    return dataclasses.replace(judgement, fault="not finite")


def _repeat(template: CheckResult, spec: OpSpec, call: Call, repeats: int) -> list[CheckResult]:
    """Repeat the same call of an op, and check that all bits stay the same; return a result for each output."""
    first = _results(spec.op, call)
    changed: dict[str, str] = {}
    for repeat in range(1, repeats + 1):
        for name, value in _results(spec.op, call).items():
            different = _different_bytes(first[name], value)
            if different and name not in changed:
                changed[name] = f"repeat {repeat} of {repeats} differs in {different} of {value.nbytes} bytes"
    same, verdict = f"{repeats} repeats, the same bits", {True: FAIL, False: PASS}
    return [
        dataclasses.replace(template, output=name, verdict=verdict[name in changed], reason=changed.get(name, same))
        for name in first
    ]


def _different_bytes(first: Tensor, second: Tensor) -> int:
    """Return how many bytes differ between two results of the same call of a verified op."""
    one, other = (x.reshape(-1).contiguous().view(torch.uint8) for x in (first, second))
    return int((one != other).sum())


def planned(spec: OpSpec, leg: str, dtypes: Iterable[str], *, quick: bool) -> Iterator[tuple[Case, str]]:
    """Yield each case of an op that runs on ``leg``, with each dtype in which it runs there.

    The leg of ttsem has the interpreter's cases, which are small enough for it, except those that repeat a call.
    """
    for case in spec.cases:
        runs = INTERPRETER in case.legs and case.check != DETERMINISM if leg == SANITIZER else leg in case.legs
        if not runs or (quick and not case.quick):
            continue
        for dtype in dtypes:
            if not (leg == CPU and dtype in case.slow):
                yield case, dtype


def timed(rows: Callable[[], list[CheckResult]], template: CheckResult) -> list[CheckResult]:
    """Run a check of the verification and return its results, which share its seconds; an exception becomes a failure.

    ``rows`` is the check, and ``template`` the result that is returned as a failure if the check raises an error.
    """
    started = time.perf_counter()
    try:
        result = rows()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        result = [dataclasses.replace(template, verdict=FAIL, reason=text)]
    share = (time.perf_counter() - started) / max(1, len(result))
    return [dataclasses.replace(row, seconds=share) for row in result]


def inputs_of(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, number: int = 0) -> Call:
    """Make the inputs and upstream gradients of a case; ``number`` seeds them, equally on every machine and device."""
    draw = Draw(zlib.crc32(f"{case.name} {number}".encode()))
    call = spec.call(case.shape, case.values, draw, dtype)
    inputs = {name: lay_out(x.to(device), case.layout) for name, x in call.inputs.items()}
    grads = tuple(lay_out(grad.to(device), case.layout) for grad in call.grads)
    if case.layout == EXPANDED:
        if all(grad.ndim == 0 for grad in grads):
            first = next(iter(inputs))
            inputs[first] = inputs[first][:1].expand_as(inputs[first])
        grads = tuple(grad.flatten()[0].expand_as(grad) for grad in grads)
    return dataclasses.replace(call, inputs=inputs, grads=grads)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return a verified op's input in another memory layout, or unchanged if the layout does not suit it.

    ``layout`` is "transposed", "hwc" (channels last), "sliced", "padded" or "offset"; others return ``x``.
    """
    if x.ndim == 0:
        return x
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "hwc":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.ndim == 4 else x
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "padded":
        return torch.cat([x, torch.zeros_like(x[..., :8])], -1)[..., : x.shape[-1]]
    if layout == "offset":
        # The tensor starts one element after an aligned address, so a kernel that assumes alignment would fail.
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x
