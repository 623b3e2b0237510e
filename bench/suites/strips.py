"""The loss of all ranks as one of them computes it: its own pairs against those of all ranks, forward and backward.

The process is the last rank of a group that sends nothing. In place of the features of another rank it has a copy of
its own, and a sum over ranks is its own part. So the time is that of kernels and host without the messages;
``python -m clipfast.bench.inspection.strips`` predicts both. The values mean nothing, and are not compared here:
``tests/kernels/test_distributed.py`` compares those of real ranks with the reference.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from clipfast.kernels import distributed_contrastive_loss
from clipfast.kernels.contrastive.exchange import Ranks, Transfer
from clipfast.kernels.contrastive.modes import MODES, choose_mode
from clipfast.kernels.contrastive.spec import STRIPS
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import Floor

from ..case import OURS, Candidate, Case, Function, Inputs, Sizes
from . import peers

FIELDS: Sizes = {"rows": 1024, "gpus": 32, "embed_dim": 512}
SMALLEST: Sizes = {"rows": 3, "gpus": 4, "embed_dim": 8}
SHAPES: dict[str, list[Sizes]] = {
    "cpu": [{"rows": 128, "gpus": 32, "embed_dim": 512}],
    "cuda": [{"rows": strip.rows, "gpus": strip.pairs // strip.rows, "embed_dim": strip.embed_dim} for strip in STRIPS],
}


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the benchmark case of a rank of the loss of all ranks, in each mode; "auto" would choose the first."""
    rows, gpus, embed_dim = shape["rows"], shape["gpus"], shape["embed_dim"]
    chosen = choose_mode([rows] * gpus, embed_dim, DTYPES[dtype])
    others = [mode for mode in MODES if mode != chosen]
    pairs, row = rows * gpus, embed_dim * DTYPES[dtype].itemsize
    in_group = functools.partial(Candidate, context=functools.partial(_as_last_rank, gpus))
    return Case(
        suite="strips", op="distributed_contrastive_loss.fwd_bwd", shape=shape, dtype=dtype, device=device,
        inputs=functools.partial(_inputs, rows, embed_dim, DTYPES[dtype], device),
        candidates=(
            in_group(OURS, functools.partial(_ours, rows, gpus, chosen), note=f"mode {chosen}"),
            *(in_group(f"{OURS} {mode}", functools.partial(_ours, rows, gpus, mode)) for mode in others),
            in_group("OpenCLIP ClipLoss", functools.partial(_open_clip, gpus), note="local_loss, gather_with_grad"),
        ),
        floor=Floor(8 * rows * pairs * embed_dim, 2 * (rows + pairs) * row),
        items=(rows, "pairs"),
        wants_grad=("image", "text", "logit_scale"),
    )  # fmt: skip


def _inputs(rows: int, embed_dim: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw the features of one rank's pairs for the benchmarked loss, with rows of length 1."""
    image, text = (torch.nn.functional.normalize(torch.randn(rows, embed_dim), dim=1) for _ in range(2))
    inputs = {"image": image.to(device, dtype), "text": text.to(device, dtype)}
    inputs["logit_scale"] = torch.tensor(1 / 0.07, device=device)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def _ours(rows: int, gpus: int, mode: str) -> Function:
    """Return our loss of all ranks in a mode as a benchmark candidate."""
    return functools.partial(distributed_contrastive_loss, mode=mode, sizes=[rows] * gpus)


def _open_clip(gpus: int) -> Function:
    """Return OpenCLIP's loss of all ranks as a benchmark candidate: each rank computes the logits of its own pairs."""
    open_clip = peers.need("open_clip.loss", "open_clip_torch")
    loss = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=gpus - 1, world_size=gpus)
    return lambda image, text, logit_scale: loss(image, text, logit_scale)


@contextlib.contextmanager
def _as_last_rank(gpus: int) -> Iterator[None]:
    """Make this process the last of ``gpus`` ranks that send each other nothing, which takes the host 30 us."""
    from clipfast.plan.planned_step import silent_group

    shift = Ranks.shift

    def returned(ranks: Ranks, block: Tensor, size: int) -> Transfer:
        """Start a transfer in the ring that receives the rows it sends.

        The group leaves received rows uninitialised, and for large or NaN logits the loss takes slower kernels.
        """
        return dataclasses.replace(shift(ranks, block, size), received=block)

    with (
        mock.patch.object(Ranks, "shift", returned),
        warnings.catch_warnings(action="ignore", category=FutureWarning),  # of the gathers that OpenCLIP calls
        silent_group(gpus, gpus - 1),
    ):
        yield
