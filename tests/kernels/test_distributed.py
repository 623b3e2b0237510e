"""Test that the contrastive loss of a batch spread over processes has the values and gradients of one process, with
equal bits in every call.
"""

import functools
import itertools
import os
import re
import signal
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from clipfast.kernels import contrastive_loss, distributed_contrastive_loss
from clipfast.kernels.contrastive.cases import LossShape
from clipfast.verify.rule import in_double, value_and_grads

from ..conftest import INTERPRET
from ..processes import error_of, run_ranks, start_ranks, wait_for
from .conftest import Recorded, call_at, leaves_of

MODES = ("gather", "ring", "scalars")
DIM = 24
# The pairs of each rank: equally many, a single one, or none. The interpreter is slow, so it computes one case of two
# ranks.
SIZES = {2: [(1, 7)]} if INTERPRET else {2: [(5, 5), (0, 6)], 4: [(3, 3, 3, 3), (9, 1, 4, 2)]}
# The scale decides which ranks use one shift for all rows of the softmax: all ("shared"), none ("online"), or some
# ("mixed"). The features of "normalized" do not have unit length.
KINDS = {"shared": 20.0, "online": 1e4, "mixed": 100.0, "normalized": 20.0}
ONE = torch.tensor(1.0)


class Case(NamedTuple):
    mode: str
    sizes: tuple[int, ...]
    kind: str

    @property
    def dtype(self):
        """Return the dtype of features: float64 if the loss takes it, since even a small mistake then fails."""
        return torch.float32 if INTERPRET or self.kind == "normalized" else torch.float64

    @property
    def options(self):
        """Return the options of the distributed loss in this case."""
        return {"normalize": self.kind == "normalized"}

    @property
    def limit(self):
        """Return the relative error that the distributed loss may have: in float32, it grows with the logits."""
        return 1e-12 if self.dtype == torch.float64 else 1e-6 if KINDS[self.kind] < 100 else 2e-7 * KINDS[self.kind]


def cases(world_size):
    """Return the cases of the distributed loss for a number of ranks."""
    return [Case(*case) for case in itertools.product(MODES, SIZES[world_size], KINDS)]


def batch(case):
    """Return the arguments of the distributed loss op for the whole batch."""
    generator = torch.Generator().manual_seed(len(case.sizes))
    image, text = (F.normalize(torch.randn(sum(case.sizes), DIM, generator=generator), dim=-1) for _ in range(2))
    if case.kind == "mixed":
        # The last rank's images are nearly opposite to all texts, so with the shared shift of the softmax the sums of
        # their exponentials underflow.
        text[:, 0] += 5
        image[-case.sizes[-1] :, 0] -= 5
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    if case.kind == "normalized":
        image, text = 30 * image, 30 * text
    inputs = {"image": image, "text": text, "logit_scale": torch.tensor(KINDS[case.kind])}
    return {name: x.to(case.dtype) for name, x in inputs.items()}


def rows_of(inputs, rows):
    """Return the arguments of the distributed loss op for some pairs."""
    return {name: x[rows] if x.ndim else x for name, x in inputs.items()}


def part(case, rank):
    """Return the arguments of the distributed loss on one rank."""
    return rows_of(batch(case), slice(sum(case.sizes[:rank]), sum(case.sizes[: rank + 1])))


def of_rank(inputs, grad=ONE, **options):
    """Return the distributed loss of a rank and its gradients."""
    return value_and_grads(functools.partial(distributed_contrastive_loss, **options), inputs, grad)


def of_batch(ranks):
    """Return the distributed loss of the whole batch from the ranks', averaged as by DistributedDataParallel."""
    mean = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in ("value", "d_logit_scale")}
    return mean | {name: torch.cat([rank[name] for rank in ranks]) / len(ranks) for name in ("d_image", "d_text")}


def assert_close(found, expected, limit, about):
    """Check the relative errors of the distributed loss and its gradients."""
    for name, value in found.items():
        error = ((value - expected[name]).norm() / expected[name].norm()).item()
        assert error <= limit, f"{about}: relative error of {name} {error:.1e}"


def every_case(rank, world_size):
    """Compute every case of the distributed loss twice on a rank."""
    results = []
    for case in cases(world_size):
        options = case.options | {"mode": case.mode, "sizes": case.sizes if case.kind == "shared" else None}
        results.append([of_rank(part(case, rank), **options) for _ in range(2)])
    return results


@pytest.mark.parametrize("world_size", SIZES)
def test_like_one_process(world_size, tmp_path, device):
    results = run_ranks(every_case, world_size, world_size, folder=tmp_path, timeout=240.0)
    for case, *ranks in zip(cases(world_size), *results, strict=True):
        one_process = functools.partial(contrastive_loss, backend="torch", **case.options)
        truth = value_and_grads(one_process, in_double(batch(case)), ONE)
        assert_close(of_batch([first for first, _ in ranks]), truth, case.limit, case)
        for first, again in ranks:
            assert all(torch.equal(first[name], again[name]) for name in first), case
            assert torch.equal(first["d_logit_scale"], ranks[0][0]["d_logit_scale"])


HALF = torch.float16 if INTERPRET else torch.bfloat16
LATE = LossShape(129, 64, scale=100.0, matched=0.33)  # late in training: pairs are alike and the scale is large


def in_16_bits(rank):
    """Compute the distributed loss of a rank under autocast."""
    inputs = rows_of(call_at("contrastive_loss", LATE).inputs, [slice(0, 60), slice(60, 129)][rank])
    with torch.autocast("cpu", HALF):
        return [of_rank(inputs, mode=mode) for mode in MODES]


def test_16_bit_operands(tmp_path, device):
    by_rank = run_ranks(in_16_bits, 2, folder=tmp_path)
    # logit_scale stays in float32 under autocast, and the features are rounded to 16 bits.
    truth = call_at("contrastive_loss", LATE, dtype=HALF).truth()
    # The gradient G of the logits is rounded to 16 bits like the features. The error in float16, for the interpreter,
    # is an eighth of bfloat16's.
    scalars, features = (1e-4, 6e-4) if INTERPRET else (2e-5, 2e-3)
    for mode, *ranks in zip(MODES, *by_rank, strict=True):
        found = of_batch(ranks)
        assert_close({name: found.pop(name) for name in ("value", "d_logit_scale")}, truth, scalars, mode)
        assert_close(found, truth, features, mode)


def largest(mode):
    """Return the number of elements of the largest tensor that an operation of the distributed loss returns."""
    wide = torch.randn(64, 4096)
    with Recorded() as record:
        of_rank({"image": wide, "text": wide, "logit_scale": torch.tensor(10.0)}, mode=mode, normalize=True)
    return max(x.numel() for x in tree_leaves([out for _, _, out in record.calls]) if isinstance(x, torch.Tensor))


def ways_to_use_it(rank):
    """Run all checks of the distributed loss that can share one process group, and return the results of this rank."""
    case = Case("gather", (3, 2, 4), "shared")
    inputs = part(case, rank)
    found = {"largest": {mode: largest(mode) for mode in MODES}}
    options = [{"mode": mode, "sizes": case.sizes} for mode in MODES]
    weight = torch.tensor([1.0, -3.0, 0.0][rank])
    found["once"] = [of_rank(inputs, **each) for each in options]
    found["by rank"] = [of_rank(inputs, weight, **each) for each in options]
    found["empty"] = [of_rank(rows_of(inputs, slice(0, 0)), **each | {"sizes": None}) for each in options]
    found["twice"] = [used_twice(inputs, **each) for each in options]
    compiled = torch.compile(lambda **leaves: 2 * distributed_contrastive_loss(**leaves), backend="aot_eager")
    found["compiled"] = value_and_grads(compiled, inputs, ONE)
    found["of two"] = in_a_group_of_two(rank, inputs)
    found["refused"] = refused(rank, inputs)
    return found


def used_twice(inputs, **options):
    """Run the backward pass of the distributed loss twice, and return twice the loss and the summed gradients."""
    leaves = leaves_of(inputs)
    loss = distributed_contrastive_loss(**leaves, **options)
    for _ in range(2):
        loss.backward(retain_graph=True)
    return {"value": 2 * loss.detach(), **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def in_a_group_of_two(rank, inputs):
    """Compute the distributed loss in a group of two of the ranks."""
    group = dist.new_group([0, 2])
    if rank == 1:
        return message(distributed_contrastive_loss, **inputs, group=group)
    return [of_rank(inputs, group=group, mode=mode) for mode in MODES]


def message(fn, *args, **kwargs):
    """Return the message with which the distributed loss refuses its arguments."""
    try:
        fn(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def refused(rank, inputs):
    """Return the messages with which the distributed loss refuses wrong arguments, some on one rank only."""
    image, text = inputs["image"], inputs["text"]
    loss = functools.partial(distributed_contrastive_loss, logit_scale=10.0)
    width, kind = (DIM, torch.float64) if rank else (DIM - 1, torch.float32)
    leaf = image.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, text), leaf, create_graph=True)
    return [
        message(loss, image[:, :width], text[:, :width]),
        message(loss, image.to(kind), text.to(kind)),
        message(loss, image, text, sizes=[3, 2]),
        message(loss, image, text, sizes=[1, 1, 1]),
        message(loss, image, text, mode="rings"),
        message(loss, image, text[1:]),
        message(loss, image, text.half()),
        message(first.sum().backward),
    ]


REFUSED = [
    "ValueError: .*same size and dtype on every rank, got float64 .3, 23., float64 .2, 24.",
    "ValueError: .*same size and dtype on every rank, got float32 .3, 24., float64 .2, 24.",
    r"ValueError: .*sizes must .* got \[3, 2\]",
    r"ValueError: .*sizes must .* got \[1, 1, 1\]",
    "ValueError: .*mode must be one of .* got 'rings'",
    "ValueError: .*image and text must have the same shape",
    "TypeError: .*text is float16",
    "RuntimeError: distributed_contrastive_loss: there is no second derivative",
]


def test_ways_to_use_it(tmp_path):
    ranks = run_ranks(ways_to_use_it, 3, folder=tmp_path)
    case = Case("gather", (3, 2, 4), "shared")
    whole = batch(case)
    expected = value_and_grads(contrastive_loss, whole, ONE)
    twice = {name: 2 * value for name, value in expected.items()}
    of_two = value_and_grads(contrastive_loss, rows_of(whole, [0, 1, 2, 5, 6, 7, 8]), ONE)
    # The value that ranks return is not weighted; only gradients are.
    by_rank = value_and_grads(functools.partial(weighted, case.sizes), whole, ONE) | {"value": expected["value"]}
    wide = 3 * 64 * 4096
    for rank in ranks:
        # In mode "ring" the largest tensor holds the rank's own features of one side; in "gather", the features of one
        # side of all ranks; and in "scalars", those of both sides.
        assert rank["largest"] == {"ring": wide // 3, "gather": wide, "scalars": 2 * wide}
        assert all(result["value"].isnan() and result["d_image"].shape == (0, DIM) for result in rank["empty"])
        for pattern, text in zip(REFUSED, rank["refused"], strict=True):
            assert re.match(pattern, text), (pattern, text)
    for index, mode in enumerate(MODES):
        for rank in ranks:
            # Mode "gather" is compared with OpenCLIP's loss, rank by rank, in losses/test_losses.py.
            assert_close(rank["once"][index], rank["once"][0], 1e-12, mode)
        for name, result in (("once", expected), ("twice", twice), ("by rank", by_rank)):
            assert_close(of_batch([rank[name][index] for rank in ranks]), result, 1e-12, f"{mode}, {name}")
        assert_close(of_batch([ranks[rank]["of two"][index] for rank in (0, 2)]), of_two, 1e-12, mode)
    assert_close(of_batch([rank["compiled"] for rank in ranks]), twice, 1e-12, "compiled")
    assert "this process is not in the group" in ranks[1]["of two"]


def weighted(sizes, image, text, logit_scale):
    """Return the mean of 1, -3 and 0 times the distributed losses of the three ranks."""
    logits, labels = logit_scale * image @ text.T, torch.arange(len(image))
    nll = sum(F.cross_entropy(side, labels, reduction="none") for side in (logits, logits.T))
    factor = torch.tensor([1.0, -3.0, 0.0]).repeat_interleave(torch.tensor(sizes))
    return (factor * nll).sum() / (2 * len(image))


def one_rank_dies(rank, mode):
    """Compute the distributed loss until another rank dies."""
    image = torch.randn(16, DIM, requires_grad=True)
    for step in range(10_000):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed_contrastive_loss(image, image, 10.0, mode=mode).backward()


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_a_rank_that_dies_is_an_error_for_the_others(mode, tmp_path):
    processes = start_ranks(one_rank_dies, 3, mode, folder=tmp_path)
    wait_for(processes, 30.0)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "RuntimeError" in error_of(tmp_path, rank)


FEW_WITH_ROWS = (6, 0, 0, 3)
TRANSFER = "batch_isend_irecv"
# Calls that every rank of the group takes part in; the first exists in PyTorch 2.13 and newer.
OF_ALL_RANKS = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "reduce")


def calls_of(rank):
    """Return for each mode the functions that the rank calls in a distributed loss and its gradients."""
    calls = []

    def recorded(name, call, *args, **kwargs):
        """Record a call of an exchange between the ranks of the distributed loss."""
        calls[-1].append(name)
        return call(*args, **kwargs)

    for name in (TRANSFER, *OF_ALL_RANKS):
        if hasattr(dist, name):
            setattr(dist, name, functools.partial(recorded, name, getattr(dist, name)))
    image, text = F.normalize(torch.randn(2, FEW_WITH_ROWS[rank], 8), dim=-1)
    for mode in MODES:
        calls.append([])
        of_rank({"image": image, "text": text, "logit_scale": torch.tensor(20.0)}, mode=mode, sizes=FEW_WITH_ROWS)
    return calls


def test_all_ranks_meet_before_some_of_them_do(tmp_path):
    # NCCL does not define a transfer between some ranks as the first communication of their group. Here two neighbours
    # in the ring have no rows, and the sizes are given, so that nothing is exchanged to find them.
    for mode, *calls in zip(MODES, *run_ranks(calls_of, len(FEW_WITH_ROWS), folder=tmp_path), strict=True):
        assert all(names[0] in OF_ALL_RANKS for names in calls), calls
        transfers = [names.count(TRANSFER) for names in calls]
        assert (min(transfers) < max(transfers)) == (mode == "ring"), calls
        of_all = [[name for name in names if name != TRANSFER] for names in calls]
        assert of_all == of_all[:1] * len(calls)


def alone(rank):
    """Return whether the distributed loss on a single rank is the loss of one process."""
    inputs = part(Case("gather", (5,), "normalized"), 0)
    expected = value_and_grads(functools.partial(contrastive_loss, normalize=True), inputs, ONE)
    return all(torch.equal(value, expected[name]) for name, value in of_rank(inputs, normalize=True).items())


def test_one_rank_is_one_process(tmp_path):
    assert run_ranks(alone, 1, folder=tmp_path) == [True]


def test_no_process_group():
    with pytest.raises(RuntimeError, match="not initialised"):
        distributed_contrastive_loss(torch.zeros(2, 8), torch.zeros(2, 8), 1.0)
