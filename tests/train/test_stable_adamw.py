"""StableAdamW: its equations, the step after a jump of the gradient, and resumed runs."""

import pytest
import torch

from clipfast.train.stable_adamw import StableAdamW

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = ((4, 3), (5,), ())
SPIKE = 30  # the step whose gradient is 100 times as large


def gradients(step):
    """Return the gradient of each tensor in a step, the third of which has none in every other step."""
    generator = torch.Generator().manual_seed(step)
    scale = 100.0 if step == SPIKE else 1.0
    grads = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return grads if step % 2 else [*grads[:2], None]


def by_the_paper(steps):
    """Compute the weights after ``steps`` by a loop over the algorithm of the paper, and the factors of the last step.

    The paper writes the bias-corrected moments as averages with decays of their own.
    """
    (beta1, beta2), eps = OPTIONS["betas"], OPTIONS["eps"]
    weights = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    moments = [(torch.zeros_like(x), torch.zeros_like(x), 0) for x in weights]
    factors = [1.0] * len(SHAPES)
    for step in range(steps):
        for k, grad in enumerate(gradients(step)):
            if grad is None:
                continue
            first, second, t = moments[k]
            t += 1
            decay1 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
            decay2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
            first = decay1 * first + (1 - decay1) * grad
            second = decay2 * second + (1 - decay2) * grad**2
            rms = (grad**2 / second.clamp_min(eps**2)).mean().sqrt().item()
            factors[k] = 1 / max(1, rms)
            rate = OPTIONS["lr"] * factors[k]
            decayed = weights[k] * (1 - rate * OPTIONS["weight_decay"])
            weights[k] = decayed - rate * first / (second.sqrt() + eps)
            moments[k] = first, second, t
    return weights, factors


@pytest.mark.parametrize("steps", [1, SPIKE, SPIKE + 1, 50])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_the_weights_follow_the_equations_of_the_paper(steps, dtype, tolerance):
    weights = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in SHAPES]
    optimizer = StableAdamW(weights, **OPTIONS)
    for step in range(steps):
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = None if grad is None else grad.to(dtype)
        optimizer.step()
    expected, factors = by_the_paper(steps)
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, rtol=tolerance, atol=tolerance)
    if steps == SPIKE + 1:  # the spike shortens the step of the tensors that see it
        assert max(factors[:2]) < 0.25
