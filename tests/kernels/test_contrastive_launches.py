"""Test the launches of the contrastive losses, recorded without a GPU: block sizes, memory, descriptors, other ops."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._library.custom_ops import OPDEFS
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels import contrastive_loss, info_nce_loss, nt_xent_loss, sigmoid_loss
from clipfast.kernels.configs import GemmConfig
from clipfast.kernels.contrastive.block_sizes import block_edges, most_bytes
from clipfast.kernels.hardware import CARDS
from clipfast.kernels.launch import record_launches
from clipfast.plan.planned_step import Problem, run_loss

from .conftest import Recorded
from .test_contrastive import call_of, each_loss

WIDE, SMALL = GemmConfig(128, 256, 64, num_warps=8, num_stages=3), GemmConfig(64, 64, 32, num_warps=8, num_stages=2)
H100 = 132


def edges_of(rows, cols, width, most=16384, tiles=WIDE):
    """Return the edges of the blocks into which the contrastive loss cuts its logits on an H100."""
    return block_edges(rows, cols, width, 2, most, H100, tiles, tiles)


# Pairs, width of the features, and the most megabytes that the loss may take beyond its inputs, gradients included.
@pytest.mark.parametrize(("pairs", "width", "limit"), [(32768, 512, 190), (32768, 768, 265), (65536, 768, 465)])
def test_blocks_are_whole_waves_and_small(pairs, width, limit):
    rows, cols = edges_of(pairs, pairs, width)
    tiles = (rows // 128) * (cols // 256)
    assert tiles / H100 > 0.95 * -(-tiles // H100)
    assert pairs % rows == pairs % cols == 0
    ledger = run_loss(Problem(pairs, embed_dim=width), "default", CARDS["h100"])
    assert ledger.peak.total() - ledger.peak["inputs"] <= limit * 1e6


@pytest.mark.parametrize("tiles", [WIDE, SMALL], ids=["wide tiles", "small tiles"])
@pytest.mark.parametrize(
    ("rows", "cols", "width"),
    [(0, 0, 16), (1, 1, 8), (1, 10**6, 512), (10**6, 3, 512), (4099, 65537, 768), (2**21, 2**21, 1024), (70, 70, 0)],
)
def test_edges_of_any_size(rows, cols, width, tiles):
    edges = edges_of(rows, cols, width, tiles=tiles)
    assert min(edges) >= 1
    assert max(edges[0], edges[0] * edges[1] / 16384) <= 16384
    assert edges[0] * edges[1] * 2 <= most_bytes(cols, width)
    # A strip with the rows of one block is again divided into a single row of blocks.
    assert edges_of(min(rows, edges[0]), cols, width, tiles=tiles)[0] >= min(rows, edges[0])


@pytest.mark.parametrize("width", [64, 384, 512, 640, 768])
def test_products_compute_no_columns_for_nothing(width):
    # With 8,192 pairs, the gradient G of the logits has several blocks, and _products_kernel multiplies each of them.
    with record_launches(90) as launches:
        x = torch.empty(8192, width, dtype=torch.bfloat16, requires_grad=True)
        contrastive_loss(x, x, 10.0).backward()
    products = next(item for item in launches if item.kernel.__name__ == "_products_kernel")
    rows, cols = products.constexprs["BLOCK_M"], products.constexprs["BLOCK_N"]
    tiles = sum(-(-products.args[size] // rows) for size in "MN") * -(-width // cols)
    assert products.grid == (tiles,)
    assert cols >= width or width % cols == 0


class RecordedInside(Recorded):
    """A dispatch mode that also records the PyTorch ops inside our ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "clipfast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def features(*size):
    """Draw features of unit length for the launches of a loss."""
    return F.normalize(torch.randn(size), dim=-1).bfloat16()


# The ops that may stand between the launches of a loss: none of them starts a kernel.
ALLOWED = ("aten::new_empty", "aten::empty", "clipfast::")
biased_loss = functools.partial(sigmoid_loss, logit_bias=torch.tensor(-5.0))


def backward_of(image, text):
    """Return the launches of the contrastive loss and its gradients on sm_90."""
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


@pytest.mark.parametrize("arch", [80, 90])
@each_loss
def test_features_without_dimensions(loss, arch):
    # Tensor descriptors cannot describe a matrix without columns, so the kernels must take pointers, on sm_90 too.
    call = call_of(loss, "cpu", torch.bfloat16, embed_dim=0)
    with record_launches(arch) as launches:
        call.results()
    assert launches
    assert not any(item.constexprs.get("IS_TMA") for item in launches)


def test_gradients_of_the_sigmoid_loss_are_computed_where_they_are_wanted():
    call = call_of("sigmoid_loss", "cpu")
    for required in (False, True):
        with record_launches(90) as launches, torch.set_grad_enabled(required):
            call.op(**call.inputs | {"image": call.inputs["image"].clone().requires_grad_()})
        names = {item.kernel.__name__ for item in launches}
        assert ("_sigmoid_grad_tile_kernel" in names) is required


def test_other_ops_do_not_grow_with_the_number_of_blocks(monkeypatch):
    # Every op that does not return a view starts a PyTorch kernel or allocates memory.
    counts = []
    for cols in (256, 128):
        monkeypatch.setattr("clipfast.kernels.contrastive.launches.edges_of", lambda *_, cols=cols: (512, cols))
        with RecordedInside() as record:
            launches = backward_of(features(512, 64), features(512, 64))
        assert [item.kernel.__name__ for item in launches].count("_grad_tile_kernel") == 512 // cols
        counts.append(sum(not func.is_view for func, _, _ in record.calls))
    assert counts[0] == counts[1] < 60


@pytest.mark.parametrize(
    ("loss", "needs_grad", "count"),
    [
        # The gradient of the logits is a single block.
        (contrastive_loss, True, 6),
        (functools.partial(contrastive_loss, normalize=True), True, 8),
        (biased_loss, True, 5),
        (functools.partial(biased_loss, normalize=True), True, 6),
        # Without gradients, a loss computes only its statistics, here in several blocks.
        (nt_xent_loss, False, 9),
        (functools.partial(nt_xent_loss, normalize=False), False, 8),
        (functools.partial(info_nce_loss, negatives=features(300, 64), in_batch=False), False, 4),
    ],
)
def test_few_launches_and_nothing_between_them(loss, needs_grad, count):
    inputs = [x.requires_grad_(needs_grad) for x in (*features(2, 256, 64), torch.tensor(10.0))]
    with RecordedInside() as record, record_launches(90) as launches:
        value = loss(*inputs)
        if needs_grad:
            torch.autograd.grad(value, inputs, torch.tensor(1.0))
    assert len(launches) == count, [item.kernel.__name__ for item in launches]
    names = {func._schema.name for func, _, _ in record.calls if not func.is_view}
    assert {name for name in names if not name.startswith(ALLOWED)} == set()


def test_gradients_of_keys_and_negatives_begin_where_a_compiler_takes_them_to(triton_device):
    x, y, z = (torch.randn(n, 7, device=triton_device, requires_grad=True) for n in (5, 5, 3))
    loss = info_nce_loss(x, y, 5.0, negatives=z)
    assert all(grad.data_ptr() % 16 == 0 for grad in torch.autograd.grad(loss, (x, y, z)))
