"""Test that ClipLoss and SigLipLoss have the values and gradients of OpenCLIP's losses, also on several ranks."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from clipfast import ClipLoss, SigLipLoss

from ..processes import run_ranks

open_clip = pytest.importorskip("open_clip")

DIM = 24
PAIRS = 5
KINDS = [(ClipLoss, open_clip.ClipLoss), (SigLipLoss, open_clip.loss.SigLipLoss)]
# Values of (local_loss, gather_with_grad).
COMBINATIONS = list(itertools.product([False, True], repeat=2))
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def features(scale, dtype=torch.float64, rank=0):
    """Draw image and text features and a scale for the losses."""
    generator = torch.Generator().manual_seed(rank)
    image, text = (F.normalize(torch.randn(PAIRS, DIM, generator=generator), dim=-1) for _ in range(2))
    return [x.to(dtype) for x in (image, text, torch.tensor(scale))]


def value_and_grads(loss, inputs):
    """Return a loss and the gradients of its inputs, for an upstream gradient of 2.5."""
    leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    (2.5 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize(
    "bias", [None, torch.tensor(-10.0), torch.tensor([3.0])], ids=["none", "scalar", "one element"]
)
@pytest.mark.parametrize("scale", [300.0, [20.0]])  # FSDP gives every parameter a dimension
@pytest.mark.parametrize("kinds", KINDS, ids=["clip", "siglip"])
def test_one_process(kinds, scale, bias):
    ours, theirs = kinds[0](world_size=0), kinds[1]()  # some callers give 0 where there is a single process
    inputs = [*features(scale), bias if bias is None else bias.double()]
    found = value_and_grads(ours, inputs)
    close(found, value_and_grads(theirs, inputs))
    assert [x.shape for x in found[3:]] == [x.shape for x in inputs[2:] if x is not None]
    close(ours.get_logits(*inputs), theirs.get_logits(*inputs))
    found, expected = (loss(*inputs, output_dict=True) for loss in (ours, theirs))
    assert list(found) == list(expected) == ["contrastive_loss"]
    close(found, expected)


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 2])
def test_chunks_and_negatives_of_siglip(chunk_size, negative_only):
    inputs = [*features(20.0), torch.tensor(-3.0).double()]
    losses = [kind(**options) for kind, options in zip(KINDS[1], ({"chunk_size": chunk_size}, {}), strict=True)]
    assert losses[0].chunk_size == chunk_size
    ours, theirs = (functools.partial(loss._loss, negative_only=negative_only) for loss in losses)
    close(value_and_grads(ours, inputs), value_and_grads(theirs, inputs))
    close(ours(*inputs[:3]), theirs(*inputs[:3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClipLoss()(*features(20.0), torch.zeros(5)), r"logit_bias must have one element, got shape \(5,\)"),
        (lambda: ClipLoss(use_horovod=True), "ClipLoss: use_horovod must be False"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"),
        (lambda: SigLipLoss(rank=2, world_size=2), r"SigLipLoss: rank must be in \[0, world_size\), got 2 of 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_several_ranks_need_a_process_group():
    ranks = {"rank": 1, "world_size": 2}
    for loss in (*(ClipLoss(*combination, **ranks) for combination in COMBINATIONS), SigLipLoss(**ranks)):
        with pytest.raises(RuntimeError, match=rf"{type(loss).__name__}: torch\.distributed is not initialised"):
            loss(*features(20.0))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("options", [{}, {"local_loss": True, "rank": 2, "world_size": 4}])
def test_ground_truth(options, cache):
    device = torch.device("cpu")
    ours, theirs = (loss(cache_labels=cache, **options) for loss in (ClipLoss, open_clip.ClipLoss))
    for pairs in (5, 5, 7):
        labels = ours.get_ground_truth(device, pairs)
        assert torch.equal(labels, theirs.get_ground_truth(device, pairs))
        assert (ours.get_ground_truth(device, pairs) is labels) == cache
    ours, theirs = (kind().get_ground_truth(device, torch.bfloat16, 5) for kind in KINDS[1])
    assert torch.equal(ours, theirs)


def every_combination(rank, world_size, dtype):
    """Compute the losses of a rank with every combination of local_loss and gather_with_grad."""
    results = []
    for local_loss, gather_with_grad in COMBINATIONS:
        options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
        for scale in (20.0, 300.0):
            inputs = [*features(scale, dtype, rank), torch.tensor(-3.0, dtype=dtype)]
            losses = [loss(**options, rank=rank, world_size=world_size) for loss in (ClipLoss, open_clip.ClipLoss)]
            results.append([value_and_grads(loss, inputs) for loss in losses])
            results[-1] += [value_and_grads(functools.partial(of_logits, loss), inputs[:3]) for loss in losses]
    refuses_other_ranks(ClipLoss, rank, world_size)
    return results


def of_logits(loss, *inputs):
    """Return a number that depends on every logit of a loss and its position."""
    return sum((logits * torch.arange(logits.numel()).view_as(logits)).sum() for logits in loss.get_logits(*inputs))


def refuses_other_ranks(kind, rank, world_size):
    """Check that a loss class refuses a rank or a world size that is not its process's."""
    for wrong in ({"rank": (rank + 1) % world_size, "world_size": world_size}, {"rank": rank, "world_size": 9}):
        with pytest.raises(ValueError, match=rf"{kind.__name__}: (rank|world_size) must be \d, this process's, got \d"):
            kind(**wrong)(*features(20.0))


# In float32, the logits of such small batches are computed all at once, and in float64 in blocks.
@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.float32), (3, torch.float64)])
def test_several_ranks(world_size, dtype, tmp_path):
    by_rank = run_ranks(every_combination, world_size, world_size, dtype, folder=tmp_path)
    # In float32 a logit of 300 is rounded by 1.5e-5. A gradient is up to 2.5 * 300 / PAIRS times as far off.
    agree = close if dtype == torch.float64 else functools.partial(torch.testing.assert_close, rtol=1e-4, atol=5e-4)
    for index, (combination, _) in enumerate(itertools.product(COMBINATIONS, range(2))):
        ranks = [results[index] for results in by_rank]
        for ours, theirs, our_logits, their_logits in ranks:
            agree(our_logits, their_logits)
            agree(ours[:3], theirs[:3])
            agree(ours[4], theirs[4])
            if combination != (True, True):
                agree(ours[3], theirs[3])
        # On a rank, OpenCLIP's gradient of the scale may differ from ours. Their means over the ranks, which
        # DistributedDataParallel takes, must agree.
        agree(*(torch.stack([rank[which][3] for rank in ranks]).mean() for which in (0, 1)))


def under_autocast(rank, world_size):
    """Return losses and gradients of float32 features under autocast, and those of rounded features in float64."""
    found = []
    for local_loss, gather_with_grad in COMBINATIONS:
        loss = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=world_size)
        inputs = features(20.0, torch.float32, rank)
        with torch.autocast("cpu", torch.bfloat16):
            ours = value_and_grads(loss, inputs)
        rounded = [x.bfloat16().double() if x.ndim else x.double() for x in inputs]
        found.append([ours, value_and_grads(loss, rounded)])
    return found


def test_several_ranks_under_autocast(tmp_path):
    for rank in run_ranks(under_autocast, 2, 2, folder=tmp_path):
        for ours, expected in rank:
            assert [x.dtype for x in ours] == [torch.float32] * 4
            torch.testing.assert_close([x.double() for x in ours], expected, rtol=1e-4, atol=1e-5)


def every_exchange(rank, world_size):
    """Compute the sigmoid losses of a rank with each of ``DIST_IMPLS``, the ways to exchange texts between ranks."""
    inputs, found = [*features(10.0, rank=rank), torch.tensor(-3.0).double()], {}
    for dist_impl in DIST_IMPLS:
        options = {"rank": rank, "world_size": world_size, "dist_impl": dist_impl}
        ours, theirs = (kind(**options) for kind in KINDS[1])
        # Texts that need no gradient are exchanged as well.
        frozen = ours(inputs[0].clone().requires_grad_(), *inputs[1:]).detach()
        found[dist_impl] = [value_and_grads(ours, inputs), value_and_grads(theirs, inputs), frozen]
    refuses_other_ranks(SigLipLoss, rank, world_size)
    return found


@pytest.mark.parametrize("world_size", [2, 3], ids=["even", "odd"])
def test_siglip_of_several_ranks(world_size, tmp_path):
    by_rank = run_ranks(every_exchange, world_size, world_size, folder=tmp_path)
    sides = [features(10.0, rank=rank)[:2] for rank in range(world_size)]
    image, text = (torch.cat(side) for side in zip(*sides, strict=True))
    whole = value_and_grads(SigLipLoss(), [image, text, torch.tensor(10.0).double(), torch.tensor(-3.0).double()])
    for dist_impl in DIST_IMPLS:
        found = [rank[dist_impl] for rank in by_rank]
        for ours, theirs, frozen in found:
            close(ours, theirs)
            close(frozen, ours[0])
        # The mean over the ranks of losses or of gradients is that of all pairs in one process.
        parts = zip(*(ours for ours, *_ in found), strict=True)
        close([(sum(p) if p[0].ndim == 0 else torch.cat(p)) / world_size for p in parts], whole)
