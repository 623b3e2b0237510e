"""The Ledger of ``clipfast plan``: the memory by category, the peak, and the FLOPs that it counts in a run."""

import torch

import clipfast
from clipfast.kernels.launch import record_launches
from clipfast.plan.ledger import Ledger


def test_live_bytes_and_flops():
    given = torch.zeros(1000)
    ledger = Ledger(categories={"later": "kept"})
    with ledger:
        one = given + 1  # the tensors ``given`` and ``one`` take 8000 bytes together
        one[::2].add_(1)  # a view takes no memory
        ledger.phase = "later"
        two = torch.cat([one, one])  # the tensor ``two`` takes 8000 bytes
        del one
        torch.zeros(1000)  # the zeros take 4000 bytes, in the place of the deleted tensor ``one``
        torch.mm(two.view(50, 40), two.view(40, 50), out=torch.empty(50, 50))  # the product takes 10000 bytes
        torch.zeros(50, 50).addmm_(two.view(50, 40), two.view(40, 50))
    assert ledger.peak == {"": 4000, "kept": 18000}
    assert sum(event.flops for event in ledger.events) == 2 * 2 * 50 * 50 * 40
    assert ledger.live == {"": 4000, "kept": 8000}


def test_flops_of_looped_attention():
    qkv = torch.ones(2, 900, 192, dtype=torch.bfloat16, requires_grad=True)
    with record_launches(90) as launches, Ledger(launches) as ledger:
        clipfast.attention(qkv, 1).sum().backward()
        ledger.book_launches()
    # Attention takes two matrix products forward and seven backward, which computes scores and their gradients twice.
    assert sum(event.flops for event in ledger.events) == 9 * 2 * 2 * 900 * 900 * 64


def test_an_op_that_takes_only_a_shape_reads_nothing():
    given = torch.ones(1000)
    with Ledger() as ledger:
        given.new_zeros(10)
        torch.zeros_like(given)
    assert [event.bytes for event in ledger.events] == [40, 4000]
