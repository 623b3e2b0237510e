"""Test the products of strips, which are few rows of logits with many columns, and the choice of the distributed
loss's mode.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from clipfast.kernels import contrastive_loss, info_nce_loss, launch, sigmoid_loss
from clipfast.kernels.contrastive import cpu, launches, strips
from clipfast.kernels.contrastive.exchange import Ranks
from clipfast.kernels.contrastive.modes import MODES, choose_mode, mode_seconds
from clipfast.kernels.contrastive.spec import small_tiles
from clipfast.kernels.contrastive.stats import Normalizers
from clipfast.verify.rule import value_and_grads

from .conftest import needs_sanitizer


def gradients(x, y, acc_x, **options):
    """Return G y, added to the accumulator ``acc_x``, and G^T x, where G is the gradient of a strip's logits."""
    row, col = (0.01 * torch.rand(2, len(side), generator=torch.Generator().manual_seed(1)) for side in (x, y))
    normalizers = Normalizers(row, col, torch.ones((), dtype=torch.int8))
    acc_y = torch.full(y.shape, torch.nan) if options else torch.zeros(y.shape)
    with small_tiles(x.dtype):
        launches.add_gradients(x, y, torch.tensor(3.0), normalizers, 5, acc_x, acc_y, **options)
    return acc_x.sum(0)[: len(x)] if acc_x.ndim == 3 else acc_x, acc_y


@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.float32), (90, torch.float16)], ids=str)
@pytest.mark.parametrize(("rows", "cols"), [(37, 150), (90, 70)], ids=["one block of rows", "several"])
def test_parts_add_up(rows, cols, arch, dtype, monkeypatch, interpreted):
    # Each of three parts of the columns has an accumulator of 96 rows, a multiple of a tile's 16. New accumulators hold
    # NaN, which no sum may keep.
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    x, y = (F.normalize(torch.randn(count, 40), dim=-1).to(dtype) for count in (rows, cols))
    expected = gradients(x, y, torch.zeros(rows, 40))
    found = gradients(x, y, torch.full((3, 96, 40), torch.nan), is_new_x=True, is_new_y=True)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    twice = torch.full((3, 96, 40), torch.nan)
    gradients(x, y, twice, is_new_x=True, is_new_y=True)
    assert (gradients(x, y, twice)[0] - 2 * expected[0]).norm() <= 1e-6 * expected[0].norm()


def hold_groups(new, dtype):
    """Check the products of groups of columns that share a block of G, with accumulators of the size ``new``."""
    widths = [24, 40, 8, 16, 48]
    x, y = (F.normalize(torch.randn(count, 40), dim=-1).to(dtype) for count in (37, sum(widths)))
    row, col = (0.01 * torch.rand(2, len(side)) for side in (x, y))
    of_block = x, y, torch.tensor(3.0), Normalizers(row, col, torch.ones((), dtype=torch.int8)), 5
    acc_x, acc_y, of_scale = torch.zeros(37, 40), torch.zeros(y.shape), []
    with small_tiles(dtype):
        expected = launches.add_gradients(*of_block, acc_x, acc_y)
        acc = torch.full(new, torch.nan)
        for is_new in (True, False):  # the second pass adds to what the first one has written
            parts = [*launches.add_strip(*of_block, widths, acc, of_scale, is_new=is_new)]
            assert [len(part) for part in parts] == widths
            assert (torch.cat(parts) - acc_y).norm() <= 1e-6 * acc_y.norm()
    total = acc.sum(0)[:37] if acc.ndim == 3 else acc
    assert (total - 2 * acc_x).norm() <= 1e-6 * acc_x.norm()
    if expected is None:
        assert of_scale == [None] * len(of_scale)
    else:
        assert (torch.cat(of_scale).sum() - 2 * expected.sum()).abs() <= 1e-5 * expected.abs().sum()


@pytest.mark.parametrize(("arch", "dtype"), [(80, torch.float32), (90, torch.float16)], ids=str)
@pytest.mark.parametrize("new", [(37, 40), (3, 48, 40)], ids=["one accumulator", "three"])
def test_groups_of_columns_share_a_block(new, arch, dtype, monkeypatch, interpreted):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    hold_groups(new, dtype)


def hold_ranks(flag):
    """Check the kernels that compute the terms of the loss of all ranks, and what its gradients need, for 35 ranks."""
    ranks, rows = 35, 70
    maxima, sums, terms = torch.randn(ranks, rows), torch.rand(ranks, rows), torch.rand(ranks, rows, 6)
    maxima[3], sums[3] = float("-inf"), 0.0  # a rank without images
    flags, terms[..., 4] = torch.ones(40, dtype=torch.int8), 0.0
    flags[-1], terms[-1, :, 4] = flag, 1 - flag
    col = torch.stack([maxima, sums], dim=2).unbind(2)
    of_terms = (torch.randn(rows), torch.rand(rows)), col, torch.randn(rows), flags, 0.5
    for grads in (torch.randn(ranks, 1), torch.zeros(ranks, 1), 1e-40 * torch.rand(ranks, 1)):
        terms[..., 5] = grads
        # The second rank has fewer pairs than the others.
        everyones = torch.cat([terms[0], terms[1, :-9], *terms[2:]])
        of_weights = everyones, terms[:, 0], torch.rand(rows - 9), slice(rows, 2 * rows - 9), torch.tensor(3.0), 0.5
        expected = 0.5 * grads[1] * of_weights[2]
        for blocks in (launches, cpu):
            weights = blocks.rank_weights(*of_weights)
            torch.testing.assert_close(weights.one_minus_p * weights.coefficient, expected, rtol=1e-5, atol=1e-44)
        for function, args in (("rank_terms", of_terms), ("rank_weights", of_weights)):
            found, expected = (getattr(blocks, function)(*args) for blocks in (launches, cpu))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flag", [1, 0])
def test_terms_of_all_ranks(flag, interpreted):
    hold_ranks(flag)


@needs_sanitizer
class TestSanitized:
    @pytest.mark.parametrize("new", [(37, 40), (3, 48, 40)], ids=["one accumulator", "three"])
    def test_groups_of_columns(self, new, sanitizer):
        hold_groups(new, torch.float32)

    def test_terms_of_all_ranks(self, sanitizer):
        hold_ranks(0)


@pytest.mark.parametrize("sizes", [[1024] * 32, [0, 8, 7, 16, 24, 8, 0, 8], [9]], ids=str)
def test_groups_of_a_block(sizes):
    ranks = Ranks(None, 0, tuple(sizes))
    groups = ranks.groups(4 * 512, 32768)
    for columns in (0, 24, 32768):
        blocks = ranks.blocks(groups, columns)
        assert [*itertools.chain(*blocks)] == groups
        assert all(len(block) == 1 or sum(sizes[i] for i in itertools.chain(*block)) <= columns for block in blocks)
    assert len(blocks) == 1 or min(sizes) == 0


@pytest.mark.parametrize(("rows", "cols"), [(0, 37), (37, 0)])
def test_new_accumulators_are_zero_without_logits(rows, cols, interpreted):
    # A rank of the distributed loss may have no pairs. Other ranks add the accumulators that it sends.
    x, y = torch.empty(rows, 40), torch.empty(cols, 40)
    for acc in gradients(x, y, torch.full((rows, 40), torch.nan), is_new_x=True, is_new_y=True):
        assert not acc.any()


# Losses with many columns of logits: the numbers of rows of their features, the loss, and the number of accumulators
# that have parts. With memory="min" and many rows, the product that loops over them has none.
LOSSES = {
    "contrastive": ((9, 700), functools.partial(contrastive_loss, logit_scale=30.0, offset=300), 1),
    "many rows": ((700, 9), functools.partial(contrastive_loss, logit_scale=20.0, offset=-300, memory="min"), 0),
    "sigmoid": ((9, 700), functools.partial(sigmoid_loss, logit_scale=10.0, logit_bias=-3.0, offset=300), 1),
    "in batch": ((9, 9, 700), functools.partial(info_nce_loss, logit_scale=20.0, in_batch=True), 1),
    "queue only": ((9, 9, 700), functools.partial(info_nce_loss, logit_scale=20.0, in_batch=False), 1),
}


@pytest.mark.parametrize(("arch", "dtype", "rtol"), [(80, torch.float32, 1e-4), (90, torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_products_with_many_columns_are_cut_into_parts(name, arch, dtype, rtol, triton_device, poison, monkeypatch):
    monkeypatch.setattr(launch, "CPU_ARCH", arch)
    counts, loss, with_parts = LOSSES[name]
    names = ("image", "text") if len(counts) == 2 else ("query", "key", "negatives")
    features = (F.normalize(torch.randn(count, 24), dim=-1).to(triton_device, dtype) for count in counts)
    inputs = dict(zip(names, features, strict=True))
    expected = value_and_grads(loss, inputs, torch.tensor(1.0))
    parts = []

    def accumulator(x, y):
        """Return the accumulator of a strip, with values that no sum may keep, and note its number of parts."""
        acc = strip_accumulator(x, y)
        parts.append(acc.shape[:-2].numel())
        return acc.fill_(torch.nan)

    strip_accumulator = launches.strip_accumulator
    monkeypatch.setattr(launches, "strip_accumulator", accumulator)
    with launches.small_blocks(1024, longest_loop=64):
        found = value_and_grads(loss, inputs, torch.tensor(1.0))
    assert len(parts) == with_parts
    assert all(number > 1 for number in parts)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6, equal_nan=True, check_dtype=False)


def test_a_strip_fills_the_gpu():
    # The products of 256 rows have only eight tiles, so the columns are divided into parts for 132 multiprocessors.
    layout = functools.partial(launches.Layout, torch.device("cpu"), torch.bfloat16, d=512, offset=0, stride_x=512)
    with launch.record_launches(90, 132):
        parts, height = strips.parts_of(layout(m=256, n=8192, stride_y=512), 256)
        assert height == 256
        assert 8 * parts > 0.75 * 132
        assert strips.parts_of(layout(m=16384, n=4096, stride_y=512), 16384)[0] == 0


@pytest.mark.parametrize(
    ("sizes", "width", "dtype", "gpus_per_node", "mode"),
    [
        ([256] * 32, 512, torch.bfloat16, 8, "scalars"),
        ([1024] * 8, 512, torch.bfloat16, 8, "gather"),
        ([4096] * 64, 1280, torch.bfloat16, 8, "gather"),
    ],
    ids=str,
)
def test_mode(sizes, width, dtype, gpus_per_node, mode):
    times = {one: mode_seconds(one, sizes, width, dtype, gpus_per_node) for one in MODES}
    assert min(times, key=times.__getitem__) == choose_mode(sizes, width, dtype, gpus_per_node) == mode, times


def test_the_time_of_a_mode_counts_the_groups_that_fit_into_a_block():
    # For 4,096 pairs on each of 64 GPUs, eight groups would be sent fastest, but a block holds four ranks' columns.
    of = functools.partial(mode_seconds, "gather", [4096] * 64, 512, torch.bfloat16)
    in_large_blocks = of()
    with launches.small_blocks(4096):  # a block holds the columns of one rank
        assert of() > in_large_blocks


def test_the_mode_does_not_gather_more_than_fits():
    assert choose_mode([8192] * 256, 1024, torch.bfloat16) == "gather"
    assert choose_mode([8192] * 257, 1024, torch.bfloat16) == "ring"  # the texts of 257 ranks take more than 4 GiB


def test_the_mode_of_any_sizes():
    for sizes, width, dtype in itertools.product(
        ([0, 1], [0] * 3, [7] * 2048), (0, 1, 4096), (torch.float16, torch.float64)
    ):
        assert choose_mode(sizes, width, dtype, 3) in MODES
