"""The rule for errors: the error of a result may be at most a few times that of PyTorch's result at the same dtype.

Both errors are differences from the truth, PyTorch's result in a higher precision. The allowed error is ``k`` times
PyTorch's, plus a unit in the last place of each value. ``k`` is 2 for values and 3 for gradients, after
FlashAttention's tests (Dao et al. 2022). The rule holds for the maximum and for the root mean square of the error, so
that neither one wrong value among many nor a small bias of all of them can pass.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0
VALUE = "value"
# Each kind of error reduces the differences between all values and the truth to one number.
KINDS: dict[str, Callable[[Tensor], float]] = {
    "max": lambda differences: differences.abs().max().item(),
    "rms": lambda differences: differences.square().mean().sqrt().item(),
}
# An error that is this many times the allowed one is no chance, so it is not judged again with more random inputs.
BEYOND_CHANCE = 300.0

# One draw of the inputs gives three sets of named results: ours, PyTorch's at the same dtype, and the truth.
Draw = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]
# One of the three sets of a ``Draw``, such as ours, for each of several draws.
Results = Sequence[Mapping[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One kind of error ("max" or "rms"): that of our result, of PyTorch's at the same dtype, and the allowed one."""

    kind: str
    ours: float
    torch: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Return whether the rule allows our error. An error that is NaN never is."""
        return self.ours <= self.allowed

    @property
    def ratio(self) -> float:
        """Return our error divided by the error that the rule allows; above 1, the output fails."""
        if self.ours == 0:
            return 0.0
        return self.ours / self.allowed if self.allowed > 0 else float("inf")

    def __str__(self) -> str:
        return f"{self.kind} error {self.ours:.3e} > allowed {self.allowed:.3e} (PyTorch's own {self.torch:.3e})"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The judgement of the rule about one output."""

    figures: tuple[Figure, ...] = ()
    fault: str = ""  # a problem other than a large error, such as a wrong shape; an output with a fault always fails
    note: str = ""  # a remark on how the errors were measured, or why there are none
    no_yardstick: bool = False  # whether PyTorch's own result has no finite value to compare with

    @property
    def passed(self) -> bool:
        """Return whether the output obeys the rule."""
        return not self.fault and all(figure.passed for figure in self.figures)

    @property
    def reason(self) -> str:
        """Return the fault that the rule finds, or why the output was not judged; empty for an output that passes."""
        return self.fault or "; ".join(str(f) for f in self.figures if not f.passed) or self.note


def judge(ours: Tensor, same_dtype: Tensor, truth: Tensor, k: float) -> Judgement:
    """Judge ``ours`` by the rule, where both ``truth`` and ``same_dtype`` are finite. All have the same shape.

    ``same_dtype`` is PyTorch's result at the same dtype, and ``k`` times its error is allowed. ``truth`` is PyTorch's
    result in a higher precision. ``ours`` must have NaN and infinity exactly where ``truth`` has them.
    """
    if ours.shape != truth.shape:
        return Judgement(fault=f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    if ours.dtype != same_dtype.dtype:
        return Judgement(fault=f"dtype {ours.dtype}, expected {same_dtype.dtype}")
    if ours.numel() == 0:
        return Judgement(note="empty")
    if not ours.is_floating_point():
        wrong = int((ours != truth).sum())
        return Judgement(fault=f"{wrong} of {ours.numel()} values differ" if wrong else "", note="exact")
    for name, where in (("NaN", torch.isnan), ("infinity", torch.isposinf), ("minus infinity", torch.isneginf)):
        if not torch.equal(where(ours), where(truth)):
            return Judgement(fault=f"{name} in other places than in the truth")
    if not truth.isfinite().any():
        return Judgement(note="no finite value in the truth")
    finite = truth.isfinite() & same_dtype.isfinite()
    if not finite.any():
        return Judgement(note="PyTorch's own result is not finite: no yardstick", no_yardstick=True)
    if not finite.all():
        ours, same_dtype, truth = ours[finite], same_dtype[finite], truth[finite]
    return Judgement(_figures(ours, same_dtype, truth, k))


def _figures(ours: Tensor, same_dtype: Tensor, truth: Tensor, k: float) -> tuple[Figure, ...]:
    """Return the maximum and the RMS error of ``ours`` and of ``same_dtype``, and the error that the rule allows."""
    exact = truth.double()
    info = torch.finfo(ours.dtype)
    rounding = (exact.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    figures = []
    for kind, reduce in KINDS.items():
        error, yardstick = reduce(ours.double() - exact), reduce(same_dtype.double() - exact)
        figures.append(Figure(kind, error, yardstick, k * yardstick + reduce(rounding)))
    return tuple(figures)


def judge_draws(ours: Results, same_dtype: Results, truth: Results) -> dict[str, Judgement]:
    """Judge each named output of an op by the rule over all draws together, since one output may be right by chance.

    A draw is one set of random inputs. Names that start with ``d_`` are gradients. A name that is missing from any of
    the results is a fault.
    """
    return {name: _judge_output(name, ours, same_dtype, truth) for name in dict.fromkeys([*truth[0], *ours[0]])}


def _judge_output(name: str, ours: Results, same_dtype: Results, truth: Results) -> Judgement:
    """Judge one named output of an op, concatenated over all draws, by the rule for errors."""
    if any(name not in result for result in (*ours, *same_dtype, *truth)):
        return Judgement(fault="one side has no such output")
    for got, expected in zip(ours, truth, strict=True):
        if got[name].shape != expected[name].shape:
            return Judgement(fault=f"shape {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}")
    mine, yardstick, exact = (
        torch.cat([result[name].flatten() for result in results]) for results in (ours, same_dtype, truth)
    )
    return judge(mine, yardstick, exact, GRADIENT if name.startswith("d_") else FORWARD)


def judge_fairly(draw: Callable[[int], Draw], few: int, many: int) -> tuple[dict[str, Judgement], list[Draw]]:
    """Judge ``few`` draws (``draw(0)``, ``draw(1)``, ...) by the rule, and ``many`` if those may have failed by chance.

    The errors of two correct implementations differ by chance: over six losses, PyTorch's largest error is less than
    half of ours about once in twenty times. Over thirty draws this does not happen, but a real fault still fails.

    Returns:
        The judgement of each output, and the draws that were judged.
    """
    draws = [draw(number) for number in range(few)]
    judgements = judge_draws(*zip(*draws, strict=True))
    failed = [judgement for judgement in judgements.values() if not judgement.passed]
    by_chance = all(not j.fault and max(f.ratio for f in j.figures) < BEYOND_CHANCE for j in failed)
    if failed and by_chance and many > few:
        draws += [draw(number) for number in range(few, many)]
        judgements = {
            name: dataclasses.replace(judgement, note=f"judged over {many} draws, as {few} were too few")
            for name, judgement in judge_draws(*zip(*draws, strict=True)).items()
        }
    return judgements, draws


def value_and_grads(
    fn: Callable[..., Any], inputs: Mapping[str, Tensor], grads: Tensor | Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run an op forward and backward; return results and gradients of inputs as "value", "value_2", "d_<name>".

    ``fn`` is called with ``inputs`` by name, in their own memory layout. ``grads`` has an upstream gradient for each
    result, which is cast to the dtype of the result. It is empty for a function without gradients.

    Raises:
        RuntimeError: an input gets no gradient.
    """
    upstream = (grads,) if isinstance(grads, Tensor) else tuple(grads)
    leaves = {name: x.detach().requires_grad_(bool(upstream) and x.is_floating_point()) for name, x in inputs.items()}
    found = fn(**leaves)
    values = found if isinstance(found, tuple) else (found,)
    results = {f"{VALUE}_{i + 1}" if i else VALUE: value.detach() for i, value in enumerate(values)}
    if upstream:
        torch.autograd.backward(values, [grad.to(value) for grad, value in zip(upstream, values, strict=True)])
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            if leaf.grad is None:
                raise RuntimeError(f"no gradient for {name}")
            results[f"d_{name}"] = leaf.grad
    return results


def cast_floats(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a verified op's ``inputs`` with floating tensors in ``dtype``, and the others as they are."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def in_double(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a verified op's ``inputs`` with floating tensors in float64, and the others as they are."""
    return cast_floats(inputs, torch.float64)
