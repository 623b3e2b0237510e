"""SigLipLoss against OpenCLIP's: one process, and several that exchange their texts."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from clipfast import SigLipLoss
from clipfast.kernels.contrastive import cpu

open_clip_loss = pytest.importorskip("open_clip.loss")
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
PAIRS, DIM = 6, 16


def features(world_size):
    torch.manual_seed(0)
    return [
        F.normalize(torch.randn(2 * PAIRS, DIM, dtype=torch.float64), dim=-1).split(PAIRS) for _ in range(world_size)
    ]


def results(loss, image, text, scale, bias):
    """The loss and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (image, text, torch.tensor(scale), torch.tensor(bias))]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def on_rank(rank, world_size, path, folder):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    found = {}
    for dist_impl in DIST_IMPLS:
        image, text = features(world_size)[rank]
        for name, kind in (("ours", SigLipLoss), ("theirs", open_clip_loss.SigLipLoss)):
            loss = kind(rank=rank, world_size=world_size, dist_impl=dist_impl)
            found[dist_impl, name] = results(loss, image, text, 10.0, -3.0)
        # texts that need no gradient are exchanged all the same
        found[dist_impl, "frozen"] = SigLipLoss(rank=rank, world_size=world_size, dist_impl=dist_impl)(
            image.requires_grad_(), text, 10.0, -3.0
        ).detach()
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_processes_agree_with_open_clip(world_size, tmp_path):
    mp.spawn(on_rank, (world_size, tmp_path / "store", tmp_path), world_size)
    for rank in range(world_size):
        found = torch.load(tmp_path / str(rank))
        for dist_impl in DIST_IMPLS:
            torch.testing.assert_close(found[dist_impl, "ours"], found[dist_impl, "theirs"], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(found[dist_impl, "frozen"], found[dist_impl, "ours"][0])


def test_parts_are_the_whole_batch(tmp_path):
    # The mean of the processes' losses is the loss of all pairs in one process, and so are the gradients' sums.
    mp.spawn(on_rank, (3, tmp_path / "store", tmp_path), 3)
    found = [torch.load(tmp_path / str(rank))["bidir", "ours"] for rank in range(3)]
    image, text = (torch.cat(side) for side in zip(*features(3), strict=True))
    value, d_image, d_text, *_ = results(SigLipLoss(), image, text, 10.0, -3.0)
    torch.testing.assert_close(sum(part[0] for part in found) / 3, value)
    torch.testing.assert_close(torch.cat([part[1] for part in found]) / 3, d_image)
    torch.testing.assert_close(torch.cat([part[2] for part in found]) / 3, d_text)


@pytest.mark.parametrize("scale", [10.0, 110.0])
def test_one_process(scale):
    image, text = features(1)[0]
    ours, theirs = (results(kind(), image, text, scale, -10.0) for kind in (SigLipLoss, open_clip_loss.SigLipLoss))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_without_a_bias_and_as_a_dict():
    image, text = features(1)[0]
    ours, theirs = (
        kind()(image, text, 10.0, None, output_dict=True) for kind in (SigLipLoss, open_clip_loss.SigLipLoss)
    )
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs)


def test_makes_no_matrix_of_logits(monkeypatch):
    image, text = features(1)[0]
    expected = SigLipLoss()(image, text, 10.0, -3.0)
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(SigLipLoss()(image, text, 10.0, -3.0), expected)


def test_logits_and_labels_are_open_clips():
    image, text = features(1)[0]
    ours, theirs = SigLipLoss(), open_clip_loss.SigLipLoss()
    for bias in (None, torch.tensor(-3.0)):
        assert torch.equal(ours.get_logits(image, text, 10.0, bias), theirs.get_logits(image, text, 10.0, bias))
    for negative_only in (False, True):
        arguments = torch.device("cpu"), torch.bfloat16, 5, negative_only
        assert torch.equal(ours.get_ground_truth(*arguments), theirs.get_ground_truth(*arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dist_impl": "ring"}, "dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\), got 2 of 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"SigLipLoss: {message}"):
        SigLipLoss(**options)
