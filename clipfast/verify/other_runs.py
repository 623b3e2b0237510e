"""Run the checks of other people's kernels: interpreted or on a GPU, executed by ttsem, and compiled.

Whether a function launches Triton kernels is found by recording its launches. If it does and no GPU is here, a child
process interprets them; ttsem executes them in another one, and the compiler takes the recorded launches. A function
that launches none runs as it is.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.dtypes import DTYPES, dtype_name
from ..kernels.spec import CPU, CUDA, INTERPRETER, Draw, Floor, OpSpec, Shape
from .child import children
from .ops import TORCH_DTYPES, Check, planned, timed
from .options import SANITIZER, Options
from .others import KernelCheck, Sizes, check_op, load, verify_other
from .report import CheckResult
from .sanitizer import lacks, sanitizer_session
from .stand_in import Choice, record_others, stand_in_gpu


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The launches of a call of a user's kernel on one architecture at the size of real use, forward and backward."""

    name: str
    shape: str
    dtype: str
    choices: list[Choice]
    floor: Floor | None  # the least work of the call
    torch_flops: int  # the floating-point operations of PyTorch's products among the launches
    arch: int  # compute capability


# The type of a function that compiles recorded launches, and yields the results of each kernel.
Compiled = Callable[[Recorded], Iterator[list[CheckResult]]]


@contextlib.contextmanager
def surroundings_of(leg: str) -> Iterator[None]:
    """Let a user's kernel run on a leg of the verification in this process, as if there were a GPU."""
    with contextlib.ExitStack() as stack:
        if leg == SANITIZER:
            stack.enter_context(sanitizer_session(cuda_is_cpu=False))
        if leg in (SANITIZER, INTERPRETER):
            stack.enter_context(stand_in_gpu())
        yield


def checks_of_other(other: KernelCheck | OpSpec, leg: str, options: Options) -> list[Check]:
    """Return all checks of a user's kernel on ``leg``."""
    spec, dtypes = _spec_of(other), _dtypes_of(other, options)
    if leg == INTERPRETER and "bfloat16" in dtypes:
        dtypes.remove("bfloat16")
    found = [
        Check(
            CheckResult(spec.name, leg, case.check, case.name, dtype, why=case.why),
            partial(verify_other, spec, leg, case, dtype, quick=options.quick),
        )
        for case, dtype in planned(spec, leg, dtypes, quick=options.quick)
        # Races and bounds hardly depend on the dtype, so ttsem runs only plain inputs in all dtypes. It runs other
        # layouts and extreme values in the first dtype, and in bfloat16, which the interpreter does not run.
        if leg != SANITIZER or case.name == str(case.shape) or dtype in (dtypes[0], "bfloat16")
    ]
    if isinstance(other, KernelCheck) and other.registered is not None and leg in (CPU, CUDA):
        found.append(Check(CheckResult(spec.name, leg, "opcheck", ""), partial(check_op, other, leg)))
    return found


def _spec_of(other: KernelCheck | OpSpec) -> OpSpec:
    """Return the specification of a user's kernel."""
    return other.spec() if isinstance(other, KernelCheck) else other


def _dtypes_of(other: KernelCheck | OpSpec, options: Options) -> list[str]:
    """Return the names of the dtypes in which a user's kernel is checked."""
    taken = {dtype_name(DTYPES[name]) for name in getattr(other, "dtypes", DTYPES)}
    return [name for name in options.dtypes if name in taken]


def record(other: KernelCheck | OpSpec, dtype: str, arch: int) -> Recorded:
    """Record the launches of a call of a user's kernel at the size of real use, forward and backward.

    If the function launches kernels only at smaller sizes, the call has the last of those sizes.

    Raises:
        ValueError: the function fails at this size.
    """
    if isinstance(other, KernelCheck):
        shapes: list[Shape] = [Sizes(tuple(sizes.items())) for sizes in (*other.shapes, other.real or other.shapes[-1])]
    else:
        shapes = list(other.small)
    found = _record_at(other, shapes.pop(), dtype, arch)
    while not found.choices and shapes:
        smaller = _record_at(other, shapes.pop(), dtype, arch)
        found = smaller if smaller.choices else found
    return found


def _record_at(other: KernelCheck | OpSpec, shape: Shape, dtype: str, arch: int) -> Recorded:
    """Record the launches of a call of a user's kernel at one size; see :func:`record`."""
    spec = _spec_of(other)
    with stand_in_gpu(arch):
        call = spec.call(shape, "", Draw(), TORCH_DTYPES[dtype])
        inputs = {name: x.requires_grad_(bool(call.grads) and x.is_floating_point()) for name, x in call.inputs.items()}

        def run() -> list[Choice]:
            """Call a user's kernel forward and backward, and return its launches."""
            with record_others() as choices:
                results = spec.op(**inputs, **call.options)
                results = results if isinstance(results, tuple) else (results,)
                if call.grads:
                    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
            return choices

        try:
            choices = run()
        except Exception as error:
            raise ValueError(f"{spec.name}: the function raised at {shape}: {type(error).__name__}: {error}") from error
        # While FLOPs are counted, launches that are wrapped for torch.compile cannot be recorded, so this calls again.
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter:
            run()
    itemsize = TORCH_DTYPES[dtype].itemsize
    floor = spec.floor(shape, itemsize, False)
    if not isinstance(other, KernelCheck) and call.grads:
        floor += spec.floor(shape, itemsize, True)
    known = floor if floor.bytes else None
    return Recorded(spec.name, str(shape), dtype, choices, known, counter.get_total_flops(), arch)


def groups_of_other(text: str, options: Options, compiled: Compiled | None) -> Iterator[list[CheckResult]]:
    """Run all checks of the kernel that MODULE:NAME in ``text`` names, and yield the results of each.

    Raises:
        TypeError, ValueError: there is a mistake in the check.
    """
    is_native = options.on_gpu
    with contextlib.nullcontext() if is_native else stand_in_gpu():
        other = load(text)
        name = _spec_of(other).name
    dtypes = _dtypes_of(other, options)
    recorded = [
        record(other, dtype, arch) for arch in options.archs for dtype in dtypes[: 1 if options.quick else None]
    ]
    is_triton = any(one.choices for one in recorded)
    legs = [CUDA] if is_native else [INTERPRETER] if is_triton else [CPU]
    if is_triton and not lacks():
        legs.append(SANITIZER)
    with children(options, [leg for leg in legs if leg != CUDA], others=(text,)) as found:
        if is_native:
            for check in checks_of_other(other, CUDA, options):
                yield timed(check.rows, check.template)
        if compiled is not None:
            for one in recorded:
                yield from compiled(one)
        yield from itertools.chain(*found)
    if skipped := _not_run(name, other, legs, dtypes, is_triton=is_triton):
        yield skipped


def _not_run(
    name: str, other: KernelCheck | OpSpec, legs: list[str], dtypes: list[str], *, is_triton: bool
) -> list[CheckResult]:
    """Return a skipped result for each kind of check of a user's kernel that cannot run here, and why."""
    rows = []
    if CUDA not in legs:
        rows.append(CheckResult(name, CUDA, "leg", "native kernels", reason="no CUDA GPU here: nothing ran natively"))
    if not is_triton:
        rows.append(CheckResult(name, SANITIZER, "leg", "Triton", reason="the function launches no Triton kernel"))
    elif SANITIZER not in legs:
        rows.append(CheckResult(name, SANITIZER, "leg", "races and bounds", reason=lacks()))
    if INTERPRETER in legs and "bfloat16" in dtypes:
        reason = "Triton's interpreter multiplies bfloat16 as raw bits"
        rows.append(CheckResult(name, INTERPRETER, "leg", "kernels", "bfloat16", reason=reason))
    if isinstance(other, KernelCheck) and other.registered is not None and not {CPU, CUDA} & {*legs}:
        reason = "no CUDA GPU here, which an op with Triton kernels needs"
        rows.append(CheckResult(name, CUDA, "opcheck", str(other.registered), reason=reason))
    if isinstance(other, KernelCheck) and not other.has_gradients:
        rows.append(CheckResult(name, legs[0], "gradients", "backward", reason="the results require no gradient"))
    return rows
