"""The rule for errors (``clipfast.verify.rule``) as assertions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clipfast.verify.rule import in_double, judge, judge_draws, value_and_grads


def as_good_as_torch(ours: Tensor, same_dtype: Tensor, truth: Tensor, k: float, name: str) -> None:
    """Assert that the result ``ours`` of an op keeps the rule for errors: at most ``k`` times PyTorch's own error.

    ``same_dtype`` is PyTorch's result in the dtype of the op, and ``truth`` the exact result, in float64.
    """
    judgement = judge(ours, same_dtype, truth, k)
    assert judgement.passed, f"{name}: {judgement.reason}"


def compare(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Tensor] | list[dict[str, Tensor]],
    grads: Tensor | Sequence[Tensor],
) -> None:
    """Assert that ``op`` and its gradients keep the rule for errors, by ``reference`` in float64 and in the same dtype.

    Several draws of ``inputs`` are judged as one. ``grads`` has an upstream gradient for each result.
    """
    draws = inputs if isinstance(inputs, list) else [inputs]
    ours = [value_and_grads(op, draw, grads) for draw in draws]
    same = [value_and_grads(reference, draw, grads) for draw in draws]
    truth = [value_and_grads(reference, in_double(draw), grads) for draw in draws]
    for name, judgement in judge_draws(ours, same, truth).items():
        assert judgement.passed, f"{name}: {judgement.reason}"
