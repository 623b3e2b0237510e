"""SigLipLoss against OpenCLIP's: one process, and several that exchange their texts."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from clipfast import SigLipLoss
from clipfast.kernels.contrastive import cpu_blocks as cpu

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
    tensors = image, text, torch.tensor(scale, dtype=image.dtype), torch.tensor(bias, dtype=image.dtype)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
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
    image, text = features(world_size)[rank]
    for wrong in ({"rank": (rank + 1) % world_size, "world_size": world_size}, {"rank": rank, "world_size": 9}):
        with pytest.raises(ValueError, match=r"SigLipLoss: (rank|world_size) must be \d, this process's, got \d"):
            SigLipLoss(**wrong)(image, text, 10.0, -3.0)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Results of each process, by the number of processes: even, and odd."""
    found = {}
    for world_size in (2, 3):
        folder = tmp_path_factory.mktemp("processes")
        mp.spawn(on_rank, (world_size, folder / "store", folder), world_size)
        found[world_size] = [torch.load(folder / str(rank)) for rank in range(world_size)]
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
def test_processes_agree_with_open_clip(dist_impl, world_size, exchanged):
    for found in exchanged[world_size]:
        torch.testing.assert_close(found[dist_impl, "ours"], found[dist_impl, "theirs"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found[dist_impl, "frozen"], found[dist_impl, "ours"][0])


@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
def test_parts_are_the_whole_batch(dist_impl, exchanged):
    # The mean of the processes' losses is the loss of all pairs in one process, and so are the gradients'.
    found = [process[dist_impl, "ours"] for process in exchanged[3]]
    image, text = (torch.cat(side) for side in zip(*features(3), strict=True))
    whole = results(SigLipLoss(), image, text, 10.0, -3.0)
    parts = [sum(values) / 3 if values[0].ndim == 0 else torch.cat(values) / 3 for values in zip(*found, strict=True)]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


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


def test_several_processes_need_a_process_group():
    with pytest.raises(RuntimeError, match=r"SigLipLoss: torch\.distributed is not initialised"):
        SigLipLoss(rank=1, world_size=2)(*features(1)[0], 10.0, -3.0)


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
