"""SigLipLoss against OpenCLIP's: one process, and several that exchange their texts."""

import pytest
import torch
import torch.nn.functional as F

from clipfast import SigLipLoss
from clipfast.kernels.contrastive import cpu_blocks as cpu
from clipfast.ranks import run_ranks

open_clip_loss = pytest.importorskip("open_clip.loss")
DIST_IMPLS = ("bidir", "shift", "reduce", "gather")
KINDS = {"ours": SigLipLoss, "theirs": open_clip_loss.SigLipLoss}
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


def on_rank(rank, world_size):
    found = {}
    image, text = features(world_size)[rank]
    for dist_impl in DIST_IMPLS:
        options = {"rank": rank, "world_size": world_size, "dist_impl": dist_impl}
        found[dist_impl] = {name: results(kind(**options), image, text, 10.0, -3.0) for name, kind in KINDS.items()}
        # Texts that need no gradient are exchanged as well.
        leaf = image.clone().requires_grad_()
        found[dist_impl]["frozen"] = SigLipLoss(**options)(leaf, text, 10.0, -3.0).detach()
    for wrong in ({"rank": (rank + 1) % world_size, "world_size": world_size}, {"rank": rank, "world_size": 9}):
        with pytest.raises(ValueError, match=r"SigLipLoss: (rank|world_size) must be \d, this process's, got \d"):
            SigLipLoss(**wrong)(image, text, 10.0, -3.0)
    return found


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    """Results of each process, by the number of processes: even, and odd."""
    return {size: run_ranks(on_rank, size, size, folder=tmp_path_factory.mktemp("ranks")) for size in (2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
def test_processes_agree_with_open_clip(dist_impl, world_size, exchanged):
    for process in exchanged[world_size]:
        found = process[dist_impl]
        torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found["frozen"], found["ours"][0])


@pytest.mark.parametrize("dist_impl", DIST_IMPLS)
def test_parts_are_the_whole_batch(dist_impl, exchanged):
    # The mean of the processes' losses is the loss of all pairs in one process, and so are the gradients.
    found = [process[dist_impl]["ours"] for process in exchanged[3]]
    image, text = (torch.cat(side) for side in zip(*features(3), strict=True))
    whole = results(SigLipLoss(), image, text, 10.0, -3.0)
    parts = [sum(values) / 3 if values[0].ndim == 0 else torch.cat(values) / 3 for values in zip(*found, strict=True)]
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [10.0, 110.0])
def test_one_process(scale):
    image, text = features(1)[0]
    ours, theirs = (results(kind(), image, text, scale, -10.0) for kind in KINDS.values())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_without_a_bias_and_as_a_dict():
    ours, theirs = (kind()(*features(1)[0], 10.0, None, output_dict=True) for kind in KINDS.values())
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs)


def test_makes_no_matrix_of_logits(monkeypatch):
    image, text = features(1)[0]
    expected = SigLipLoss()(image, text, 10.0, -3.0)
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(SigLipLoss()(image, text, 10.0, -3.0), expected)


def test_logits_and_labels_are_open_clips():
    image, text = features(1)[0]
    ours, theirs = (kind() for kind in KINDS.values())
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
