"""Verify the ops: the errors of each case are judged by the rule, or its results must have the same bits each time."""

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels.dtypes import DTYPES, dtype_name
from ..kernels.spec import CPU, CUDA, DETERMINISM, EXPANDED, EXTREME, INTERPRETER, Call, Case, Draw, OpSpec, specs
from .context import exact_float32, poisoned
from .report import FAIL, PASS, SKIP, CheckResult, results_of
from .rule import Draw as DrawResults
from .rule import Judgement, cast_floats, judge_fairly, value_and_grads

TORCH_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
# The truth is computed in float64 if the reference's largest tensor has at most this many elements; eight tensors of
# that size exist at once. For larger ones it is computed in float32, which can only judge the half-precision dtypes.
FLOAT64_ELEMENTS = {"cpu": 2**26, "cuda": 2**29}
# A case that fails over a few draws is judged again, over up to MANY_DRAWS draws with MANY_ELEMENTS elements together.
MANY_DRAWS, MANY_ELEMENTS = 32, 2**25
INTERPRETER_DRAWS = 3
REPEATS = {CPU: 5, CUDA: 100}
QUICK_REPEATS = {CPU: 3, CUDA: 20}


def verify_case(spec: OpSpec, leg: str, case: Case, dtype: str, *, quick: bool) -> list[CheckResult]:
    """Check one case of an op in a dtype such as "float32", and return a row for each output."""
    template = CheckResult(spec.name, leg, case.check, case.name, dtype, why=case.why)
    device = "cuda" if leg == CUDA else "cpu"
    if case.check == DETERMINISM:
        repeats = (QUICK_REPEATS if quick else REPEATS)[leg]
        return _repeat(template, spec, inputs_of(spec, case, TORCH_DTYPES[dtype], device), repeats)
    return _hold_to_rule(template, spec, case, TORCH_DTYPES[dtype], device)


def _hold_to_rule(
    template: CheckResult, spec: OpSpec, case: Case, dtype: torch.dtype, device: str
) -> list[CheckResult]:
    """Check one case of an op by the rule for errors."""
    truth_dtype = torch.float32 if case.shape.elements > FLOAT64_ELEMENTS[device] else torch.float64
    if dtype == truth_dtype:
        reason = f"{case.shape.elements:.1e} elements: a float64 truth does not fit; a float32 one cannot judge float32"
        return [dataclasses.replace(template, verdict=SKIP, reason=reason)]

    def draw(number: int) -> DrawResults:
        """Draw the inputs of a case to verify, and compute our results, PyTorch's and the truth."""
        call = inputs_of(spec, case, dtype, device, number)
        with poisoned():
            ours = _results(spec.op, call)
        widened = dataclasses.replace(call, inputs=cast_floats(call.inputs, truth_dtype))
        with exact_float32():
            truth = _results(spec.reference, widened)
            same_dtype = _results(spec.reference, call)
            if case.cancels and spec.fused is not None:
                fused = _results(spec.fused, call)
                same_dtype = {name: _less_exact(same_dtype[name], fused[name], truth[name]) for name in truth}
        return ours, same_dtype, truth

    few = min(case.draws, INTERPRETER_DRAWS) if template.leg == INTERPRETER else case.draws
    many = max(few, min(MANY_DRAWS, MANY_ELEMENTS // max(case.shape.elements, 1)))
    judgements, draws = judge_fairly(draw, few, many)
    if case.check == EXTREME:
        judgements = {name: _finite(name, judgement, draws) for name, judgement in judgements.items()}
    return results_of(dataclasses.replace(template, truth=dtype_name(truth_dtype)), judgements)


def _results(function: Callable[..., object], call: Call) -> dict[str, Tensor]:
    """Return the results and gradients of an op or its reference in a call to verify."""
    return value_and_grads(functools.partial(function, **call.options), call.inputs, call.grads)


def _less_exact(one: Tensor, other: Tensor, truth: Tensor) -> Tensor:
    """Return the less exact one of two references of a verified op."""
    errors = [(result.double() - truth).abs().max() for result in (one, other)]
    return one if errors[0] >= errors[1] else other


def _finite(name: str, judgement: Judgement, draws: Sequence[DrawResults]) -> Judgement:
    """Return a judgement of the rule that fails if a result is not finite."""
    if judgement.fault or all(ours[name].isfinite().all() for ours, _, _ in draws):
        return judgement
    return dataclasses.replace(judgement, fault="not finite")


def _repeat(template: CheckResult, spec: OpSpec, call: Call, repeats: int) -> list[CheckResult]:
    """Repeat the same call of a verified op, and check that the bits are the same; return a row for each output."""
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
    """Return how many bytes differ between two results of a verified op's repeated call."""
    one, other = (x.reshape(-1).contiguous().view(torch.uint8) for x in (first, second))
    return int((one != other).sum())


def planned(op: str, leg: str, dtypes: Iterable[str], *, quick: bool) -> Iterator[tuple[Case, str]]:
    """Iterate over the cases of ``op`` that run on ``leg``, each with a dtype."""
    for case in specs()[op].cases:
        if leg not in case.legs or (quick and not case.quick):
            continue
        for dtype in dtypes:
            if not (leg == CPU and dtype in case.slow):
                yield case, dtype


def timed(rows: Callable[[], list[CheckResult]], template: CheckResult) -> list[CheckResult]:
    """Return the results of a check of the verification, with its seconds divided among them; an exception fails."""
    started = time.perf_counter()
    try:
        result = rows()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        result = [dataclasses.replace(template, verdict=FAIL, reason=text)]
    share = (time.perf_counter() - started) / max(1, len(result))
    return [dataclasses.replace(row, seconds=share) for row in result]


def inputs_of(spec: OpSpec, case: Case, dtype: torch.dtype, device: str, number: int = 0) -> Call:
    """Make the inputs of a case to verify; a draw (``number``) has the same values on every machine, device and leg."""
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
    """Return an input of a verified op in another memory layout, or unchanged if the layout does not suit it."""
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
    if layout == "offset":
        # The tensor starts one element past an aligned address, where a vector load would fail.
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x
