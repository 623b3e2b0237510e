"""What the ranks of a distributed loss call of ``torch.distributed``, and in which order."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipfast.kernels import distributed_contrastive_loss
from clipfast.ranks import run_ranks
from clipfast.verify.rule import value_and_grads

from ..conftest import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="tests the exchange, which is the same for all kernels")
SIZES = (6, 0, 0, 3)
TRANSFER = "batch_isend_irecv"
# Calls that every rank of the group takes part in; the first is that of PyTorch 2.13 and newer.
OF_ALL_RANKS = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "reduce")


def calls_of(rank, mode):
    """Return the names of what the rank calls in a loss and its gradients."""
    calls = []

    def recorded(name, call, *args, **kwargs):
        calls.append(name)
        return call(*args, **kwargs)

    for name in (TRANSFER, *OF_ALL_RANKS):
        if hasattr(dist, name):
            setattr(dist, name, functools.partial(recorded, name, getattr(dist, name)))
    image, text = (F.normalize(torch.randn(SIZES[rank], 8), dim=-1) for _ in range(2))
    loss = functools.partial(distributed_contrastive_loss, mode=mode, sizes=SIZES)
    value_and_grads(loss, {"image": image, "text": text, "logit_scale": torch.tensor(20.0)}, torch.tensor(1.0))
    return calls


@pytest.mark.parametrize("mode", ["gather", "ring", "scalars"])
def test_all_ranks_meet_before_some_of_them_do(mode, tmp_path):
    # NCCL does not define a transfer between some ranks that is the first communication of their group. Here two
    # neighbours in the ring have no rows, and the sizes are given, so that nothing is exchanged to find them.
    calls = run_ranks(calls_of, len(SIZES), mode, folder=tmp_path)
    assert all(names[0] in OF_ALL_RANKS for names in calls), calls
    transfers = [names.count(TRANSFER) for names in calls]
    assert (min(transfers) < max(transfers)) == (mode == "ring"), calls
    of_all = [[name for name in names if name != TRANSFER] for names in calls]
    assert of_all == of_all[:1] * len(SIZES)
