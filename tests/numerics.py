"""The rule for errors: as good as PyTorch at the same dtype, both held against float64."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def as_good_as_torch(ours: Tensor, same_dtype: Tensor, truth: Tensor, k: float, name: str) -> None:
    """Assert that the maximum and the RMS error of ``ours`` are at most ``k`` times PyTorch's at the same dtype.

    A unit in the last place of each value comes on top, since the yardstick may be exact by accident. NaN and infinity
    must sit in the same places as in ``truth``.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{name}: dtype {ours.dtype}, expected {same_dtype.dtype}"
    if ours.numel() == 0:
        return
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: NaN in other places than in the truth"
    assert torch.equal(ours.isinf(), truth.isinf()), f"{name}: infinity in other places than in the truth"
    finite = truth.isfinite() & same_dtype.isfinite()
    if not finite.any():
        return
    exact = truth[finite].double()
    info = torch.finfo(ours.dtype)
    rounding = (exact.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    for kind, reduce in (("max", lambda e: e.abs().max()), ("rms", lambda e: e.square().mean().sqrt())):
        error = reduce(ours[finite].double() - exact).item()
        yardstick, floor = reduce(same_dtype[finite].double() - exact).item(), reduce(rounding).item()
        allowed = k * yardstick + floor
        assert error <= allowed, f"{name}: {kind} error {error:.3e} > {k} x PyTorch's {yardstick:.3e} + {floor:.3e}"


def value_and_grads(fn: Callable[..., Tensor], inputs: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """``fn`` of ``inputs``, and the gradients of those that are floating: ``{"value": ..., "d_<name>": ...}``."""
    # A detached view keeps the layout that a test asks for.
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    value = fn(**leaves)
    value.backward(grad.to(value))
    grads = {f"d_{name}": x.grad for name, x in leaves.items() if x.requires_grad}
    assert all(g is not None for g in grads.values()), (
        f"no gradient for {[name for name, g in grads.items() if g is None]}"
    )
    return {"value": value.detach(), **grads}


def compare(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor] | list[dict[str, Tensor]],
    grad: Tensor,
) -> None:
    """Hold ``op`` and its gradients to the rule, against ``reference`` in float64 and in the inputs' own dtype.

    Several draws of ``inputs`` are judged as one: a single number, such as a loss, is right by chance now and then.
    """
    draws = inputs if isinstance(inputs, list) else [inputs]
    ours, same, truth = [], [], []
    for draw in draws:
        ours.append(value_and_grads(op, draw, grad))
        same.append(value_and_grads(reference, draw, grad))
        exact = {name: x.double() if x.is_floating_point() else x for name, x in draw.items()}
        truth.append(value_and_grads(reference, exact, grad.double()))
    for name, value in truth[0].items():
        assert ours[0][name].shape == value.shape, (
            f"{name}: shape {tuple(ours[0][name].shape)}, expected {tuple(value.shape)}"
        )
        k = FORWARD if name == "value" else GRADIENT
        together = [torch.cat([result[name].flatten() for result in results]) for results in (ours, same, truth)]
        as_good_as_torch(*together, k, name)
