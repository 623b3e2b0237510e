"""The loss of a batch spread over processes has the values and gradients of one process, always in the same bits."""

import dataclasses
import functools
import itertools
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipfast.kernels import contrastive_loss, distributed_contrastive_loss
from clipfast.kernels.contrastive.distributed import choose_mode
from clipfast.ranks import error_of, run_ranks, start_ranks, wait_for

from ..conftest import INTERPRET
from .conftest import loss_inputs

MODES = ("gather", "ring", "scalars")
DIM = 24
# The rows of each rank: equally many, a single one, or none.
SIZES = {2: [(5, 5), (1, 7), (0, 6)], 3: [(4, 4, 4), (6, 0, 3)], 4: [(3, 3, 3, 3), (9, 1, 4, 2)]}
# The scale decides where the shared shift is used: on all ranks, on none, on some. The last kind has features that are
# not unit rows.
KINDS = {"shared": 20.0, "online": 1e4, "mixed": 100.0, "normalized": 20.0}
NAMES = ("image", "text", "scale")
not_interpreted = pytest.mark.skipif(INTERPRET, reason="tests the exchange, which is the same for all kernels")


@dataclasses.dataclass(frozen=True)
class Case:
    mode: str
    sizes: tuple[int, ...]
    kind: str
    dtype: torch.dtype

    @property
    def options(self):
        return {"normalize": self.kind == "normalized"}

    @property
    def limit(self):
        """The largest relative error allowed; in float32, a logit of 100 itself is only right to 6e-6."""
        return 1e-12 if self.dtype == torch.float64 else 1e-6 if KINDS[self.kind] < 100 else 2e-7 * KINDS[self.kind]


def cases(world_size):
    if INTERPRET:
        return [Case(mode, (1, 7), kind, torch.float32) for mode, kind in itertools.product(MODES, KINDS)]
    every = itertools.product(MODES, SIZES[world_size], KINDS)
    # In float64 even a small mistake exceeds the limit.
    return [Case(*case, torch.float64 if case[2] != "normalized" else torch.float32) for case in every]


def batch(case):
    """Return the features of the whole batch, and the scale."""
    generator = torch.Generator().manual_seed(len(case.sizes))
    image, text = (F.normalize(torch.randn(sum(case.sizes), DIM, generator=generator), dim=-1) for _ in range(2))
    if case.kind == "mixed":
        # The last rank's images are nearly opposite to all texts, so with the shared shift their sums underflow.
        text[:, 0] += 5
        image[-case.sizes[-1] :, 0] -= 5
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    if case.kind == "normalized":
        image, text = 30 * image, 30 * text
    return [x.to(case.dtype) for x in (image, text, torch.tensor(KINDS[case.kind]))]


def part(case, rank):
    """Return what a rank holds."""
    image, text, scale = batch(case)
    own = slice(sum(case.sizes[:rank]), sum(case.sizes[: rank + 1]))
    return [image[own], text[own], scale]


def value_and_grads(fn, leaves, grad=1.0, **options):
    leaves = [x.clone().requires_grad_() for x in leaves]
    loss = fn(*leaves, **options)
    (grad * loss).backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}}


def of_batch(ranks):
    """Return what DistributedDataParallel makes of the ranks' results."""
    mean = {name: torch.stack([rank[name] for rank in ranks]).mean(0) for name in ("loss", "scale")}
    return mean | {name: torch.cat([rank[name] for rank in ranks]) / len(ranks) for name in ("image", "text")}


def assert_close(found, expected, limit, about):
    for name, value in found.items():
        error = ((value - expected[name]).norm() / expected[name].norm()).item()
        assert error <= limit, f"{about}: relative error of {name} {error:.1e}"


def every_case(rank, world_size):
    results = []
    for case in cases(world_size):
        options = case.options | {"mode": case.mode, "sizes": case.sizes if case.kind == "shared" else None}
        run = functools.partial(value_and_grads, distributed_contrastive_loss, part(case, rank), **options)
        results.append([run(), run()])
    return results


@pytest.mark.parametrize("world_size", [2] if INTERPRET else SIZES)
def test_like_one_process(world_size, tmp_path):
    results = run_ranks(every_case, world_size, world_size, folder=tmp_path)
    for case, *ranks in zip(cases(world_size), *results, strict=True):
        truth = value_and_grads(contrastive_loss, [x.double() for x in batch(case)], backend="torch", **case.options)
        assert_close(of_batch([first for first, _ in ranks]), truth, case.limit, case)
        for first, again in ranks:
            assert all(torch.equal(first[name], again[name]) for name in first), case
            assert torch.equal(first["scale"], ranks[0][0]["scale"])


def late_in_training():
    """Return a 16-bit dtype, and features as late in training: pairs are alike and the scale is large."""
    torch.manual_seed(0)
    inputs = loss_inputs((129, 64), torch.float32, torch.device("cpu"), matched=0.33, scale=100.0)
    return torch.float16 if INTERPRET else torch.bfloat16, list(inputs.values())


def in_16_bits(rank):
    dtype, (image, text, scale) = late_in_training()
    own = [slice(0, 60), slice(60, 129)][rank]
    with torch.autocast("cpu", dtype):
        return [
            value_and_grads(distributed_contrastive_loss, [image[own], text[own], scale], mode=mode) for mode in MODES
        ]


def test_16_bit_operands(tmp_path):
    by_rank = run_ranks(in_16_bits, 2, folder=tmp_path)
    dtype, (image, text, scale) = late_in_training()
    rounded = [x.to(dtype).double() for x in (image, text)]
    truth = value_and_grads(contrastive_loss, [*rounded, scale.double()], backend="torch")
    # on a CPU only the features are rounded, in kernels G too
    scalars, features = (1e-4, 6e-4) if INTERPRET else (2e-5, 2e-5)
    for mode, *ranks in zip(MODES, *by_rank, strict=True):
        found = of_batch(ranks)
        assert_close({name: found.pop(name) for name in ("loss", "scale")}, truth, scalars, mode)
        assert_close(found, truth, features, mode)


def like_open_clip(rank):
    from open_clip import ClipLoss

    theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=3)
    results = []
    for kind in ("shared", "online"):
        inputs = part(Case("", (4, 4, 4), kind, torch.float64), rank)
        ours = [value_and_grads(distributed_contrastive_loss, inputs, 2.5, mode=mode) for mode in MODES]
        results.append([value_and_grads(theirs, inputs, 2.5), *ours])
    return results


@not_interpreted
def test_like_open_clip(tmp_path):
    pytest.importorskip("open_clip")
    by_rank = run_ranks(like_open_clip, 3, folder=tmp_path)
    for kind in zip(*by_rank, strict=True):
        for theirs, *ours in kind:
            expected = {name: theirs[name] for name in ("loss", "image", "text")}
            for mode, found in zip(MODES, ours, strict=True):
                assert_close({name: found[name] for name in expected}, expected, 1e-12, mode)
        # Each of OpenCLIP's ranks has a share of the scale's gradient, each of ours the mean of these shares.
        scale = torch.stack([theirs["scale"] for theirs, *_ in kind]).mean()
        for _, *ours in kind:
            assert_close({"scale": ours[0]["scale"]}, {"scale": scale}, 1e-12, "mean")


class Largest(TorchDispatchMode):
    """A record of the largest tensor that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def largest(rank, mode):
    wide = torch.randn(64, 4096)
    with Largest() as seen:
        value_and_grads(distributed_contrastive_loss, [wide, wide, torch.tensor(10.0)], mode=mode, normalize=True)
    return seen.numel


def ways_to_use_it(rank):
    """Run everything that one process group can serve, and return what this rank finds."""
    case = Case("gather", (3, 2, 4), "shared", torch.float64)
    inputs = part(case, rank)
    found = {"largest": {mode: largest(rank, mode) for mode in MODES}}
    options = {mode: {"mode": mode, "sizes": case.sizes} for mode in MODES}
    found["once"] = [value_and_grads(distributed_contrastive_loss, inputs, **options[mode]) for mode in MODES]
    found["by rank"] = [
        value_and_grads(distributed_contrastive_loss, inputs, [1.0, -3.0, 0.0][rank], **options[mode]) for mode in MODES
    ]
    found["twice"] = [used_twice(inputs, options[mode]) for mode in MODES]
    compiled = torch.compile(lambda *leaves: 2 * distributed_contrastive_loss(*leaves), backend="aot_eager")
    found["compiled"] = value_and_grads(compiled, inputs)
    found["of two"] = in_a_group_of_two(rank, inputs)
    found["refused"] = refused(rank, inputs)
    return found


def used_twice(inputs, options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = distributed_contrastive_loss(*leaves, **options)
    for _ in range(2):
        loss.backward(retain_graph=True)
    return {"loss": 2 * loss.detach(), **{name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}}


def in_a_group_of_two(rank, inputs):
    group = dist.new_group([0, 2])
    if rank == 1:
        return message(distributed_contrastive_loss, *inputs, group=group)
    return [value_and_grads(distributed_contrastive_loss, inputs, group=group, mode=mode) for mode in MODES]


def message(fn, *args, **kwargs):
    try:
        fn(*args, **kwargs)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def refused(rank, inputs):
    image, text, _ = inputs
    loss = functools.partial(distributed_contrastive_loss, logit_scale=10.0)
    width, kind = (DIM, torch.float64) if rank else (DIM - 1, torch.float32)
    leaf = image.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf, text), leaf, create_graph=True)
    second = ""
    try:
        first.sum().backward()
    except RuntimeError as error:
        second = str(error)
    return [
        message(loss, image[:, :width], text[:, :width]),
        message(loss, image.to(kind), text.to(kind)),
        message(loss, image, text, sizes=[3, 2]),
        message(loss, image, text, sizes=[1, 1, 1]),
        message(loss, image, text, mode="rings"),
        message(loss, image, text[1:]),
        message(loss, image, text.half()),
        second,
    ]


REFUSED = [
    "ValueError: .*the same size and dtype on every rank, got float64 .3, 23., float64 .2, 24., float64 .4, 24.",
    "ValueError: .*the same size and dtype on every rank, got float32 .3, 24., float64 .2, 24., float64 .4, 24.",
    r"ValueError: .*sizes must have the rows of each of 3 ranks, . of them on rank ., got \[3, 2\]",
    r"ValueError: .*sizes must have the rows of each of 3 ranks, . of them on rank ., got \[1, 1, 1\]",
    "ValueError: .*mode must be one of auto, gather, ring, scalars, got 'rings'",
    "ValueError: .*image and text must have the same shape",
    "TypeError: .*text is float16, but image is float64",
    "distributed_contrastive_loss: there is no second derivative",
]


@not_interpreted
def test_ways_to_use_it(tmp_path):
    ranks = run_ranks(ways_to_use_it, 3, folder=tmp_path)
    case = Case("gather", (3, 2, 4), "shared", torch.float64)
    expected = value_and_grads(contrastive_loss, batch(case))
    twice = {name: 2 * value for name, value in expected.items()}
    wide = 3 * 64 * 4096
    for rank in ranks:
        # The largest tensor is the rank's own features in the ring, and everyone's otherwise.
        assert rank["largest"] == {"ring": wide // 3, "gather": wide, "scalars": wide}
        for pattern, text in zip(REFUSED, rank["refused"], strict=True):
            assert re.match(pattern, text) or pattern in text, (pattern, text)
    for index, mode in enumerate(MODES):
        assert_close(of_batch([rank["once"][index] for rank in ranks]), expected, 1e-12, mode)
        assert_close(of_batch([rank["twice"][index] for rank in ranks]), twice, 1e-12, mode)
        assert_close(of_batch([rank["by rank"][index] for rank in ranks]), weighted(case), 1e-12, mode)
        two = of_batch([ranks[rank]["of two"][index] for rank in (0, 2)])
        assert_close(two, value_and_grads(contrastive_loss, without_rank_1(case)), 1e-12, mode)
    assert_close(of_batch([rank["compiled"] for rank in ranks]), twice, 1e-12, "compiled")
    assert "this process is not in the group" in ranks[1]["of two"]


def weighted(case):
    """Return the mean of 1, -3 and 0 times the losses of the three ranks."""

    def loss(image, text, scale):
        logits, labels = scale * image @ text.T, torch.arange(len(image))
        of_rows = F.cross_entropy(logits, labels, reduction="none")
        nll = of_rows + F.cross_entropy(logits.T, labels, reduction="none")
        factor = torch.tensor([1.0, -3.0, 0.0]).repeat_interleave(torch.tensor(case.sizes))
        return (factor * nll).sum() / (2 * len(image))

    # The value that ranks return is not weighted; only gradients are.
    return value_and_grads(loss, batch(case)) | {"loss": contrastive_loss(*batch(case))}


def without_rank_1(case):
    image, text, scale = batch(case)
    kept = [0, 1, 2, 5, 6, 7, 8]
    return [image[kept], text[kept], scale]


def one_rank_dies(rank, mode):
    image = torch.randn(16, DIM, requires_grad=True)
    for step in range(10_000):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed_contrastive_loss(image, image, 10.0, mode=mode).backward()


@not_interpreted
@pytest.mark.parametrize("mode", MODES)
def test_a_rank_that_dies_is_an_error_for_the_others(mode, tmp_path):
    processes = start_ranks(one_rank_dies, 3, mode, folder=tmp_path)
    wait_for(processes, 30.0)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "RuntimeError" in error_of(tmp_path, rank)


def alone(rank):
    inputs = part(Case("gather", (5,), "normalized", torch.float32), 0)
    ours = value_and_grads(distributed_contrastive_loss, inputs, normalize=True)
    expected = value_and_grads(contrastive_loss, inputs, normalize=True)
    return all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_one_rank_is_one_process(tmp_path):
    assert run_ranks(alone, 1, folder=tmp_path) == [True]


def test_no_process_group():
    with pytest.raises(RuntimeError, match=r"distributed_contrastive_loss: torch\.distributed is not initialised"):
        distributed_contrastive_loss(torch.zeros(2, 8), torch.zeros(2, 8), 1.0)


def test_auto():
    sizes = [[1024] * 9, [1024] * 8, [1024] * 8 + [1025], [131072] * 8, [131072] * 7 + [131073], [131072] * 16]
    found = [choose_mode(of_ranks, 512, torch.bfloat16) for of_ranks in sizes]
    assert found == ["scalars", "gather", "gather", "gather", "ring", "ring"]
    # the limit of a gather is one of bytes
    assert choose_mode([65536] * 8, 1024, torch.bfloat16) == "gather"
    assert choose_mode([65536] * 8, 1024, torch.float32) == "ring"
