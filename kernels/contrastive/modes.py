"""The choice of the mode of the contrastive loss of all ranks, by an estimate of each mode's time.

The estimate depends on sizes alone, so it is the same on every rank. It takes the rates of an H100 and its links from
the table of hardware, whatever the GPU is. Another GPU has other rates, but a similar ratio of them. Each of W ranks
has b of the N pairs; c is the time of one product of a rank, 2 b N D FLOPs, and t(x) the time in which x rows are sent.
A step of any mode has about the same vectors to send, which are left out.

    gather     t(texts)              + c    + 3 c, beside which the gradients of the texts are sent group by group
    ring       W steps of the longer of c / W and t(b), then W of the longer of 3 c / W and t(b) + t(gradients of b)
    scalars    t(texts and images)   + 2 c                + 4 c
"""

from collections.abc import Sequence

import torch

from ..hardware import CARDS, Cluster
from .exchange import Ranks
from .launches import columns_of_block

MODES = ("gather", "ring", "scalars")
# FLOP/s of 16-bit products in the kernels of strips: about 0.8 of the 700 TFLOP/s that the power of an H100 allows.
FLOPS_PER_S = 550e12
# Seconds by which the statistics of a block of logits, and its gradients, take longer than their products: by the model
# of an H100, those of 256 rows and 8,192 columns. Their launches start and end with idle multiprocessors, and the
# statistics are merged.
PER_STATS, PER_BLOCK = 30e-6, 20e-6
MOST_GATHERED = 2**32  # the most bytes of other ranks' features in a mode that "auto" may choose; the ring holds none


def choose_mode(
    sizes: Sequence[int], embed_dim: int, dtype: torch.dtype, gpus_per_node: int = Cluster.gpus_per_node
) -> str:
    """Return the mode of the contrastive loss of all ranks that "auto" stands for, the same on every rank.

    It is the fastest by :func:`mode_seconds` of those in which a rank holds at most 4 GiB of others' features.
    """
    row = embed_dim * dtype.itemsize
    held = {"gather": sum(sizes) * row, "ring": 0, "scalars": 2 * sum(sizes) * row}
    allowed = [mode for mode in MODES if held[mode] <= MOST_GATHERED]
    return min(allowed, key=lambda mode: mode_seconds(mode, sizes, embed_dim, dtype, gpus_per_node))


def mode_seconds(
    mode: str, sizes: Sequence[int], embed_dim: int, dtype: torch.dtype, gpus_per_node: int = Cluster.gpus_per_node
) -> float:
    """Return the estimated seconds of a step of the loss in a mode, without the time that all modes have in common.

    Args:
        mode: "gather", "ring" or "scalars".
        sizes: the pairs of each rank; the rank with the most sets the time.
        embed_dim: numbers in a row of features.
        dtype: dtype of the products.
        gpus_per_node: the ranks that share a node.
    """
    ranks, rows, pairs = len(sizes), max(sizes), sum(sizes)
    cluster = Cluster(CARDS["h100"], gpus_per_node)
    flops_per_s = FLOPS_PER_S if dtype.itemsize == 2 else cluster.card.reached(half=False)
    product = 2 * rows * pairs * embed_dim / flops_per_s
    row, grad_row = embed_dim * dtype.itemsize, 4 * embed_dim

    def sent(bytes_of_row: int, messages: int = 1, *, is_ring: bool = False) -> float:
        """Return the seconds in which a rank sends as many rows as one rank holds, in ``messages`` messages."""
        return cluster.message_s(ranks, rows * bytes_of_row, messages, is_ring=is_ring)

    if mode == "scalars":
        return (ranks - 1) * sent(2 * row) + 6 * product + 2 * (PER_STATS + PER_BLOCK)
    to_owners = (ranks - 1) * sent(8)  # the sums of the columns, which "scalars" does not send
    if mode == "ring":
        forward = product / ranks + PER_STATS
        backward = 3 * product / ranks + PER_BLOCK
        steps = max(forward, sent(row, is_ring=True)) + max(backward, sent(row + grad_row, 2, is_ring=True))
        return (ranks - 1) * steps + forward + backward + sent(grad_row, is_ring=True) + to_owners
    columns = columns_of_block(rows, pairs, embed_dim, dtype)
    groups = len(Ranks(None, 0, tuple(sizes)).groups(grad_row, columns))
    backward = 3 * product / groups + PER_BLOCK
    wire = (ranks - 1) * sent(grad_row) / groups
    forward = product + PER_STATS
    return (ranks - 1) * sent(row) + to_owners + forward + backward + (groups - 1) * max(backward, wire) + wire
