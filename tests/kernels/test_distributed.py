"""The loss of a batch spread over processes: that of one process, in values, gradients and bits."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import contrastive_loss, distributed_contrastive_loss

from ..conftest import INTERPRET
from ..process_group import run_ranks

MODES = ("gather", "ring", "scalars")
DIM = 24
# Rows of each rank: as many on each; one, which leaves a column without others; none.
SIZES = {2: [(5, 5), (1, 7), (0, 6)], 3: [(4, 4, 4), (6, 0, 3)], 4: [(3, 3, 3, 3), (9, 1, 4, 2)]}
# By the scale: the shared shift everywhere, nowhere, and on some ranks only; and features of other lengths than 1.
KINDS = {"shared": 20.0, "online": 1e4, "mixed": 100.0, "normalized": 20.0}


@dataclasses.dataclass(frozen=True)
class Case:
    mode: str
    sizes: tuple[int, ...]
    kind: str
    dtype: torch.dtype

    def options(self):
        return {"normalize": self.kind == "normalized"}


def cases(world_size):
    # float64 shows any mistake; the kernels have none
    dtypes = [torch.float32] if INTERPRET else [torch.float64, torch.float32]
    return [Case(*case) for case in itertools.product(MODES, SIZES[world_size], KINDS, dtypes)]


def batch(case):
    """Features of the whole batch, and the scale."""
    generator = torch.Generator().manual_seed(len(case.sizes))
    image, text = (F.normalize(torch.randn(sum(case.sizes), DIM, generator=generator), dim=-1) for _ in range(2))
    if case.kind == "mixed":
        # the last rank's images are as unlike all texts as can be: with the shared shift, nothing is left of them
        text[:, 0] += 5
        text = F.normalize(text, dim=-1)
        image[-case.sizes[-1] :, 0] -= 5
        image = F.normalize(image, dim=-1)
    if case.kind == "normalized":
        image, text = 30 * image, 30 * text
    return [x.to(case.dtype) for x in (image, text, torch.tensor(KINDS[case.kind]))]


def value_and_grads(fn, leaves, **options):
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = fn(*leaves, **options)
    loss.backward()
    return {"loss": loss.detach(), **dict(zip(("image", "text", "scale"), (x.grad for x in leaves), strict=True))}


def on_rank(case, rank):
    image, text, scale = batch(case)
    own = slice(sum(case.sizes[:rank]), sum(case.sizes[: rank + 1]))
    sizes = case.sizes if case.kind == "shared" else None
    options = case.options() | {"mode": case.mode, "sizes": sizes}
    return value_and_grads(distributed_contrastive_loss, [image[own], text[own], scale], **options)


def every_case(rank, world_size):
    return [[on_rank(case, rank) for _ in range(2)] for case in cases(world_size)]


def of_batch(ranks):
    """What DistributedDataParallel makes of the ranks' results."""
    mean = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in ("loss", "scale")}
    return mean | {name: torch.cat([rank[name] for rank in ranks]) / len(ranks) for name in ("image", "text")}


@pytest.mark.parametrize("world_size", [2] if INTERPRET else SIZES)
def test_like_one_process(world_size, tmp_path):
    results = run_ranks(every_case, world_size, world_size, folder=tmp_path)
    for case, *ranks in zip(cases(world_size), *results, strict=True):
        truth = value_and_grads(contrastive_loss, [x.double() for x in batch(case)], **case.options())
        for name, value in of_batch([rank[0] for rank in ranks]).items():
            error = ((value - truth[name]).norm() / truth[name].norm()).item()
            limit = 1e-12
            if not error <= limit: print(case, name, error, truth[name].norm())
        for rank in ranks:
            assert all(torch.equal(rank[0][name], rank[1][name]) for name in rank[0]), case
    assert 0
