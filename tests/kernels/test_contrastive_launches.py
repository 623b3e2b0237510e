"""What the losses launch on a GPU, recorded without one: blocks of whole waves, memory, descriptors, few other ops."""

import pytest
import torch
import torch.nn.functional as F
from torch._library.custom_ops import OPDEFS
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels import contrastive_loss
from clipfast.kernels.configs import BlockConfig, GemmConfig, override
from clipfast.kernels.contrastive import triton_blocks
from clipfast.kernels.contrastive.block_sizes import block_edges, most_bytes, steps_of_block
from clipfast.kernels.hardware import CARDS
from clipfast.kernels.launch import record_launches
from clipfast.plan.step import Problem, run_step

from ..conftest import LEG
from .conftest import Recorded

pytestmark = pytest.mark.skipif(LEG != "cpu", reason="launches are recorded from CPU tensors")
WIDE, SMALL = GemmConfig(128, 256, 64, num_warps=8, num_stages=3), GemmConfig(64, 64, 32, num_warps=8, num_stages=2)
H100 = 132
# Pairs, width, and the most megabytes beyond the inputs, gradients included.
GOALS = [(32768, 512, 190), (32768, 768, 265), (65536, 768, 465)]


def edges_of(rows, cols, width, most=16384, tiles=WIDE, itemsize=2):
    return block_edges(rows, cols, width, itemsize, most, H100, tiles, tiles)


@pytest.mark.parametrize(("pairs", "width", "_"), GOALS)
def test_blocks_are_whole_waves(pairs, width, _):
    rows, cols = edges_of(pairs, pairs, width)
    tiles = (rows // 128) * (cols // 256)
    assert tiles / H100 > 0.95 * -(-tiles // H100)
    assert pairs % rows == pairs % cols == 0


@pytest.mark.parametrize(("pairs", "width", "limit"), GOALS)
def test_memory(pairs, width, limit):
    ledger = run_step(Problem(pairs, embed_dim=width), "default", CARDS["h100"])
    assert ledger.peak.total() - ledger.peak["inputs"] <= limit * 1e6


@pytest.mark.parametrize("tiles", [WIDE, SMALL], ids=["wide tiles", "small tiles"])
@pytest.mark.parametrize(
    ("rows", "cols", "width"),
    [(0, 0, 16), (1, 1, 8), (1, 10**6, 512), (10**6, 3, 512), (4099, 65537, 768), (2**21, 2**21, 1024), (70, 70, 0)],
)
def test_edges_of_any_size(rows, cols, width, tiles):
    edges = edges_of(rows, cols, width, tiles=tiles)
    assert all(1 <= edge <= 16384 for edge in edges)
    assert edges[0] * edges[1] * 2 <= most_bytes(cols, width)
    # a strip of so many rows is one row of blocks again
    assert edges_of(min(rows, edges[0]), cols, width, tiles=tiles)[0] >= min(rows, edges[0])


def test_edges_stay_below_a_limit():
    assert edges_of(150, 150, 24, most=64) == (64, 64)


def test_time_of_blocks():
    # Two programs for each multiprocessor take twice as long as one, and a launch takes some time itself.
    one, two = (steps_of_block(128, 256 * n * H100, 64, H100, WIDE, WIDE) for n in (1, 2))
    assert one < two < 2 * one
    # Of products with long and short programs, the short ones fill the room that the long ones leave.
    assert steps_of_block(4096, 8192, 512, H100, WIDE, WIDE) < 2 * steps_of_block(4096, 4096, 512, H100, WIDE, WIDE)


def test_blocks_can_be_chosen():
    x = torch.empty(1024, 64, dtype=torch.bfloat16)
    with record_launches(90), override("contrastive_block 16-bit", BlockConfig(512, 256)):
        assert triton_blocks._block_edges(x, x) == (512, 256)
        assert [strip.stop for strip in triton_blocks.strips(x, x)] == [512, 1024]


class RecordedInside(Recorded):
    """A record of PyTorch's ops within ours as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clipfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def features(rows, width):
    return F.normalize(torch.randn(rows, width), dim=-1).bfloat16()


def backward_of(image, text):
    """Return the launches of the loss and its gradients on sm_90."""
    leaves = [x.requires_grad_() for x in (image, text)]
    with record_launches(90) as launches:
        contrastive_loss(*leaves, 10.0).backward()
    return launches


@pytest.mark.parametrize("kind", ["expanded", "overlapping"])
def test_rows_that_share_memory_are_copied(kind):
    row = features(1, 200)
    image = row[:, :64].expand(32, 64) if kind == "expanded" else row.as_strided((16, 64), (8, 1))
    launches = backward_of(image.detach(), features(len(image), 64))
    descriptors = [arg for item in launches for arg in item.args.values() if isinstance(arg, TensorDescriptor)]
    assert descriptors
    assert all(one.strides[0] >= one.shape[1] for one in descriptors)


def test_other_ops_do_not_grow_with_the_number_of_blocks():
    # What is no view of a tensor is a kernel of PyTorch, or memory from its allocator.
    counts = []
    for cols in (512, 128):
        with RecordedInside() as record, override("contrastive_block 16-bit", BlockConfig(512, cols)):
            launches = backward_of(features(512, 64), features(512, 64))
        kernels = [item.kernel.__name__ for item in launches]
        assert kernels.count("_grad_tile_kernel") == 512 // cols
        counts.append(sum(not func.is_view for func, _, _ in record.calls))
    assert counts[0] == counts[1] < 60
