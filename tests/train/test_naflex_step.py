"""A training step on images of several sizes: factors on its gradients, micro-batches, and torch.compile."""

import random

import pytest
import torch
from torch import nn

from clipfast.data import Batch
from clipfast.kernels import contrastive_loss
from clipfast.losses.accumulation import accumulate_gradients, micro_batches
from clipfast.models import build
from clipfast.models.packed_images import pack_images
from clipfast.models.packed_text import pack_on_host
from clipfast.models.registry import read_model_config
from clipfast.train.naflex_options import loss_scale
from clipfast.train.step import TrainingStep, Upload

from ..small_runs import NAFLEX

PATCH, MOST, CONTEXT = 4, 24, 12


def pairs(count, seed=0):
    """Return images of random sizes, with MOST patches at most, and texts of random lengths."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        rows = draw.randint(2, 6)
        size = 3, PATCH * rows, PATCH * draw.randint(2, MOST // rows)
        images.append(torch.randint(0, 256, size, dtype=torch.uint8, generator=generator))
    texts = torch.zeros(count, CONTEXT, dtype=torch.long)
    for row in texts:
        length = draw.randint(2, CONTEXT)
        row[: length - 1] = torch.randint(1, 62, (length - 1,), generator=generator)
        row[length - 1] = 63
    return images, texts


def model_in(dtype):
    """Return a small model with random parameters, of which none is zero, so that each of them affects the features."""
    torch.manual_seed(0)
    model = build(read_model_config(NAFLEX)).to(dtype).train()
    for parameter in model.parameters():
        if parameter.ndim:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model


def step_of(model, **options):
    """Return the training step of a model with a learning rate of 0, so that its weights stay."""
    plain = torch.autocast("cpu", enabled=False)
    return TrainingStep(
        model, torch.optim.SGD(model.parameters(), 0.0), contrastive_loss, lambda: plain, None, 64, **options
    )


def uploaded(images, texts, size=None, *, for_gpu=False):
    """Return a training batch as the trainer gives it to the step."""
    batch = Batch(pack_images(images, PATCH, for_gpu=for_gpu), texts, [])
    return Upload(torch.device("cpu"), lambda part: pack_on_host(part, torch.device("cpu"), always=True))(batch, size)


def gradients(model):
    """Return the gradients of a model's parameters by name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_near(found, expected, most):
    """Check that gradients differ by at most ``most`` times the largest element of the parameter's gradient."""
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= most * gradient.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize(("kind", "factor"), [("linear", 1.5), ("sqrt", 1.5**0.5)])
def test_a_factor_scales_the_gradients_and_not_the_loss_that_is_logged(kind, factor):
    model, batch = model_in(torch.float64), uploaded(*pairs(6))
    loss = step_of(model).backward(*batch).item()
    plain, step = gradients(model), step_of(model, loss_scale=loss_scale(kind, 4))
    step.optimizer.zero_grad()
    assert step.backward(*batch).item() == pytest.approx(loss, rel=1e-12)
    assert_near(gradients(model), {name: factor * gradient for name, gradient in plain.items()}, 1e-12)


@pytest.mark.parametrize("for_gpu", [False, True])
def test_micro_batches_have_the_gradients_of_the_batch(for_gpu):
    model, (images, texts) = model_in(torch.float64), pairs(7)
    step = step_of(model, loss_scale=loss_scale("linear", 4))
    loss = step.backward(*uploaded(images, texts))
    whole = gradients(model)
    in_parts = uploaded(images, texts, 3, for_gpu=for_gpu)
    assert [len(part) for part in in_parts[0]] == [3, 3, 1]
    assert sum(len(part.patches) for part in in_parts[0]) == len(pack_images(images, PATCH).patches)
    for of_texts in (in_parts[1], texts):  # texts are padded, not packed, if a tower reads the padding
        step.optimizer.zero_grad()
        assert step.backward(in_parts[0], of_texts).item() == pytest.approx(loss.item(), rel=1e-12)
        assert_near(gradients(model), whole, 1e-12)
    step.optimizer.zero_grad()
    # accumulate_gradients splits packed images itself.
    accumulate_gradients(model, pack_images(images, PATCH), texts, 2)
    assert_near({name: 7 / 4 * gradient for name, gradient in gradients(model).items()}, whole, 1e-12)


@pytest.mark.long
def test_batches_of_all_sizes_are_compiled_twice():
    """The model is compiled for the sizes of the first batch, and for any sizes at the second batch."""
    torch.compiler.reset()
    compiled, plain, graphs = model_in(torch.float64), model_in(torch.float64), []
    compiled.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for seed, count in enumerate((4, 7, 9, 5, 4, 6)):
        batch = uploaded(*pairs(count, seed))
        assert step_of(compiled).backward(*batch).item() == pytest.approx(step_of(plain).backward(*batch).item())
    assert_near(gradients(compiled), gradients(plain), 1e-12)
    assert len(graphs) == 2


@pytest.mark.parametrize("for_gpu", [False, True])
def test_packed_images_are_split_in_the_order_of_the_batch(for_gpu):
    images, _ = pairs(9)
    parts = pack_images(images, PATCH, for_gpu=True).split(4, for_gpu=for_gpu)
    assert [len(part) for part in parts] == [4, 4, 1]
    for part, own in zip(parts, (images[:4], images[4:8], images[8:]), strict=True):
        expected = pack_images(own, PATCH, for_gpu=for_gpu)
        assert part.max_patches == expected.max_patches
        for name in ("patches", "grids", "order"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name


def test_wrong_micro_batches():
    images = pack_images(pairs(4)[0], PATCH).split(2)
    with pytest.raises(ValueError, match=r"equally many, at least one, got 4 and 3"):
        micro_batches(images, torch.zeros(3, CONTEXT), 2)
    with pytest.raises(ValueError, match=r"micro-batches of \[2, 2\] images need texts .* got \[4\]"):
        micro_batches(images, [torch.zeros(4, CONTEXT)], 2)
    assert [len(texts) for _, texts in micro_batches(images, torch.zeros(4, CONTEXT), 1)] == [2, 2]
