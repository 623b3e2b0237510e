"""Test that gradients are summed over micro-batches in the buckets that DistributedDataParallel sends."""

import functools

import torch
from torch.nn.parallel import DistributedDataParallel

from clipfast.kernels import distributed_contrastive_loss
from clipfast.models import build, get_model_config
from clipfast.plan.ledger import Ledger
from clipfast.train.step import TrainingStep

from ..processes import run_ranks

ROWS, STEPS = 9, 2


def loss_of(ranks, image, text, scale):
    """Return the distributed contrastive loss of ranks that have equally many pairs."""
    return distributed_contrastive_loss(image, text, scale, sizes=[len(image)] * ranks)


def trained(rank, ranks, forgets):
    """Train a model on a rank, and return the peak of memory in the rehearsal and in each step, the bytes of all
    gradients, and the weights.

    ``forgets`` frees all gradients before each step, as PyTorch's ``zero_grad`` does by default.
    """
    torch.manual_seed(0)
    config = get_model_config("ViT-T-8-32")
    model = build(config)
    # The update of the weights by SGD allocates no memory.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the optimizer has its state from the start, as in a continued run
    optimizer.zero_grad()
    if forgets:
        optimizer.zero_grad = lambda set_to_none: type(optimizer).zero_grad(optimizer)
    peaks = []
    with Ledger() as ledger:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        plain = functools.partial(torch.autocast, "cpu", enabled=False)
        step = TrainingStep(model, optimizer, functools.partial(loss_of, ranks), plain, 1.0, 4, parallel)
        for take in (step.rehearse, *[step] * STEPS):
            images = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8)
            texts = torch.randint(1, config.text.vocab_size, (ROWS, model.context_length))
            ledger.begin()
            take(images, texts)
            peaks.append(ledger.peak.total())
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return peaks, weights.nbytes, weights


def test_sums_of_micro_batches_take_no_memory_of_their_own(tmp_path):
    folders = [tmp_path / name for name in ("kept", "forgotten")]
    for folder in folders:
        folder.mkdir()
    kept, forgotten = (
        run_ranks(trained, 2, 2, forgets, folder=folder) for forgets, folder in zip((False, True), folders, strict=True)
    )
    for (peaks, gradients, weights), (before, _, expected) in zip(kept, forgotten, strict=True):
        assert torch.equal(weights, expected)
        assert peaks[-1] < before[-1] - 0.95 * gradients
    assert torch.equal(kept[0][2], kept[1][2])
