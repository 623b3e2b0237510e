"""The specifications of the contrastive losses: inputs, floors, calls that are compiled offline, and tuning targets."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..configs import GemmConfig, RowConfig, config_key, override
from ..spec import Call, Draw, Floor, OpSpec, Shipped, Target, Tunable
from . import contrastive_loss, info_nce_loss, nt_xent_loss, sigmoid_loss
from .cases import CONTRASTIVE, INFO_NCE, NT_XENT, SIGMOID, LossShape, PairShape, QueueShape, SigmoidShape, ViewShape
from .launches import small_blocks

ONE = torch.tensor(1.0)


def features(shape: LossShape | SigmoidShape | QueueShape, values: str, draw: Draw) -> tuple[Tensor, Tensor]:
    """Make the features of both sides of the pairs: unit rows [pairs, embed_dim], unless ``values`` says otherwise."""
    size = shape.pairs, shape.embed_dim
    first, noise = draw.unit(*size), draw.unit(*size)
    if shape.matched == 1:
        second = first.clone()
    else:
        second = F.normalize(shape.matched * first + (1 - shape.matched) * noise, dim=-1)
    if values == "duplicate rows":
        twice = torch.arange(shape.pairs, device=draw.device) // 2
        first, second = first[twice], second[twice]
    elif values == "all-equal rows":
        first = second = first[:1].repeat(shape.pairs, 1)
    elif values == "zero rows":
        first[:3], second[-3:] = 0, 0
    elif values == "large":
        first = 100 * first
    elif values == "lengths":
        lengths = torch.linspace(0.1, 30, shape.pairs, device=draw.device)[:, None]
        first, second = lengths * first, second / lengths
    elif values == "one-hot":
        first = second = torch.eye(*size, device=draw.device)
    return first, second


def make(names: tuple[str, str], shape: LossShape | SigmoidShape | QueueShape, values: str, draw: Draw) -> Call:
    """Make the inputs of a loss: features of these names, scale (and bias) of the logits, and a queue of negatives."""
    first, second = features(shape, values, draw)
    scale = torch.tensor(shape.scale, device=draw.device)
    options: dict[str, bool | int] = {"normalize": shape.normalize}
    more = {}
    if isinstance(shape, SigmoidShape):
        more["logit_bias"] = torch.tensor(shape.bias, device=draw.device)
        options = {"offset": shape.offset, **options}
    if isinstance(shape, QueueShape):
        negatives = draw.unit(shape.queue, shape.embed_dim)
        if values == "all-equal rows":
            negatives = first[:1].repeat(shape.queue, 1)
        elif values == "long keys":
            second = 200 * second
        elif values in ("long negatives", "lengths"):
            negatives = 200 * negatives
        more = {"negatives": negatives} if shape.queue > 0 else {}
        options = {"in_batch": shape.in_batch, **options}
    return Call({names[0]: first, names[1]: second, "logit_scale": scale, **more}, (ONE,), options)


def floor_of(forward: float, backward: float) -> Callable[[PairShape, int, bool], Floor]:
    """Return the least work of a loss whose passes take ``forward`` and ``backward`` products of all logits.

    The matrix of logits is not stored. Features are read in both passes, and their gradients written in the backward pass.
    """

    def floor(shape: PairShape, itemsize: int, is_backward: bool) -> Floor:
        """Count the least work of a loss of pairs."""
        product, reading = 2 * shape.elements * shape.embed_dim, 2 * shape.pairs * shape.embed_dim * itemsize
        return Floor(backward * product, 2 * reading) if is_backward else Floor(forward * product, reading)

    return floor


def info_nce_floor(shape: QueueShape, itemsize: int, backward: bool) -> Floor:
    """Count the least work of InfoNCE with gradients of the queries only.

    In the forward pass, one product gives the sums. The backward pass recomputes it, and computes one more product for
    the gradient of the queries.
    """
    row = shape.embed_dim * itemsize
    product, reading = 2 * shape.elements * shape.embed_dim, (2 * shape.pairs + shape.queue) * row
    return Floor(2 * product, reading + shape.pairs * row) if backward else Floor(product, reading)


class Strip(NamedTuple):
    """The logits that one rank computes in the distributed loss: its own pairs against those of all ranks."""

    rows: int
    pairs: int
    embed_dim: int


TILED = ("contrastive_stats", "contrastive_pairs", "contrastive_grad_tile", "sigmoid_grad_tile")


@contextlib.contextmanager
def small_tiles(dtype: torch.dtype) -> Iterator[None]:
    """Let the contrastive kernels take tiles of 32 x 32 and blocks of 64 x 64 logits, so that small cases have
    several.
    """
    small = {name: GemmConfig(32, 32, 64, num_warps=4, num_stages=1) for name in TILED}
    small["contrastive_products"] = GemmConfig(16, 8, 64, num_warps=4, num_stages=1)
    with contextlib.ExitStack() as stack:
        for name, config in small.items():
            stack.enter_context(override(config_key(name, dtype), config))
        stack.enter_context(small_blocks(64))
        yield


def _gemm(*kernels: str) -> tuple[Tunable, ...]:
    """Return kernels with a matrix product as tunable ones, given their names in the tables of configurations."""
    functions = (f"_{kernel.removeprefix('contrastive_')}_kernel" for kernel in kernels)
    return tuple(Tunable(*names, GemmConfig) for names in zip(kernels, functions, strict=True))


SUMS = ("_stats_kernel", "_pairs_kernel", "_totals_kernel")
GRADIENTS = ("_grad_tile_kernel", "_products_kernel", "_finish_kernel")
ONE_BLOCK = ("_gradients_kernel", "_through_norm_kernel")
DTYPES = ("bf16", "fp32", "fp16")
GPU_SIZES = (16384, 512), (32768, 768), (4096, 512), (65536, 768), (8192, 512), (32768, 512)
# The strips of the distributed loss whose time is predicted, and whose kernels the offline compiler compiles.
STRIPS = tuple(
    Strip(rows, pairs, width)
    for rows, pairs in ((256, 8192), (1024, 32768), (2048, 65536), (4096, 262144))
    for width in (512, 768, 1024, 1280)
)
PRODUCTS = _gemm("contrastive_grad_tile", "contrastive_products", "contrastive_stats")
HALF_PRODUCTS, SMALL_PRODUCTS = (
    tuple(
        Tunable(f"{tunable.kernel}_{size}", function, GemmConfig)
        for tunable, function in zip(PRODUCTS, ("_grad_tile_kernel", "_gradients_kernel", "_stats_kernel"), strict=True)
    )
    for size in ("half", "small")
)
ROWS = Tunable("contrastive_rows", "_finish_kernel", RowConfig)
loss_spec = functools.partial(
    OpSpec, category="loss", items=("pairs", "pairs"), follows_autocast=False, small_tiles=small_tiles
)

SPECS = (
    loss_spec(
        op=contrastive_loss, reference=reference.contrastive_loss, make=functools.partial(make, ("image", "text")), cases=CONTRASTIVE,
        small=(LossShape(11, 6, 5.0, 0.3), LossShape(11, 6, 5.0, 0.3, normalize=True)),
        suite="loss", torch_op="contrastive", kernels=("_normalize_kernel", *SUMS, *GRADIENTS, *ONE_BLOCK, "_strip_products_kernel",
                 "_rank_terms_kernel", "_rank_weights_kernel"),
        # In the forward pass, one product gives both log-sum-exps. The backward pass recomputes it, and computes one more
        # product for each of the two gradients. A version that keeps the N x N matrix needs no recomputation (6 N^2 D): it may be faster than this
        # floor if the matrix fits into memory.
        floor=floor_of(1, 3), float32=("logit_scale",),
        bench={
            "cpu": tuple(LossShape(pairs, 512) for pairs in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
            "cuda": tuple(LossShape(*size) for size in GPU_SIZES),
        },
        gate={"cpu": {"pairs": 4096}, "cuda": {"pairs": 16384}},
        # 1001 and 9001 stand for a last batch of any size, whose rows are not aligned. fp16 is here because only it scales
        # G, the gradient with respect to the logits.
        # From 8192 on, G is more than one block. Tiles of its products that are wider than high are turned for 640 columns.
        shipped=(
            Shipped("N1024 D512", LossShape(1024, 512, 10.0), DTYPES),
            Shipped("N1024 D512 normalised", LossShape(1024, 512, 10.0, normalize=True)),
            Shipped("N1001 D512", LossShape(1001, 512, 10.0)),
            Shipped("N8192 D512", LossShape(8192, 512, 10.0), ("bf16", "fp32")),
            Shipped("N8192 D640", LossShape(8192, 640, 10.0)),
            Shipped("N9001 D512", LossShape(9001, 512, 10.0)),
        ),
        targets=(
            Target("contrastive", LossShape(16384, 512), (*PRODUCTS, ROWS)),
            # With 1,408 pairs, an H100 computes tiles of half the size in one round, and small tiles in two.
            Target("contrastive-half", LossShape(1408, 512), HALF_PRODUCTS),
            Target("contrastive-small", LossShape(1024, 512), SMALL_PRODUCTS),
            # With this large scale, sums with one shift would underflow, so the logits are computed once more.
            Target("contrastive-online", LossShape(16384, 512, 1000.0), _gemm("contrastive_pairs")),
        ),
    ),
    loss_spec(
        op=sigmoid_loss, reference=reference.sigmoid_loss, make=functools.partial(make, ("image", "text")), cases=SIGMOID,
        small=(SigmoidShape(11, 6, 5.0, -3.0, 0.3),),
        suite="sigmoid", torch_op="sigmoid",
        kernels=(
            "_sigmoid_pairs_kernel", "_sigmoid_sums_kernel", "_sigmoid_grad_tile_kernel", "_scaled_kernel",
            *GRADIENTS[1:], *ONE_BLOCK,
        ),
        # In the forward pass, one product gives the loss and G, the gradient with respect to the logits, since G does
        # not depend on a sum over logits.
        floor=floor_of(1, 2), float32=("logit_scale", "logit_bias"),
        bench={"cpu": (SigmoidShape(2048, 512),), "cuda": (SigmoidShape(16384, 512), SigmoidShape(4096, 512))},
        gate={"cpu": {"pairs": 2048}, "cuda": {"pairs": 8192}},
        shipped=(
            Shipped("N1024 D512", SigmoidShape(1024, 512), DTYPES),
            Shipped("N1001 D512", SigmoidShape(1001, 512)),
        ),
        targets=(Target("sigmoid", SigmoidShape(16384, 512), _gemm("sigmoid_grad_tile")),),
    ),
    loss_spec(
        op=info_nce_loss, reference=reference.info_nce_loss, make=functools.partial(make, ("query", "key")), cases=INFO_NCE,
        small=(QueueShape(11, 7, 6, 5.0, 0.3, in_batch=True), QueueShape(11, 7, 6, 5.0, 0.3)),
        suite="info_nce", torch_op="info_nce", kernels=("_normalize_kernel", *SUMS, "_queries_kernel", *GRADIENTS, "_strip_products_kernel"),
        floor=info_nce_floor, frozen=("key", "negatives"), float32=("logit_scale",),
        bench={"cpu": (QueueShape(256, 16384, 128),), "cuda": (QueueShape(1024, 65536, 128),)},
        gate={"cpu": {"pairs": 2048}, "cuda": {"pairs": 8192}},
        shipped=(
            Shipped("N1024 K4096 D128", QueueShape(1024, 4096, 128)),
            Shipped("N1024 K4096 D128 in batch", QueueShape(1024, 4096, 128, in_batch=True)),
            Shipped("N256 K65536 D128 in batch", QueueShape(256, 65536, 128, in_batch=True)),
        ),
    ),
    loss_spec(
        op=nt_xent_loss, reference=reference.nt_xent_loss, make=functools.partial(make, ("first", "second")), cases=NT_XENT,
        small=(ViewShape(11, 6, 5.0, 0.3),),
        suite="nt_xent", torch_op="nt_xent", kernels=("_normalize_kernel", *SUMS, "_views_kernel", *GRADIENTS),
        # Each logit serves two views, so the sums take half a product, which the backward pass recomputes.
        floor=floor_of(0.5, 1.5), float32=("logit_scale",),
        bench={"cpu": (ViewShape(2048, 512),), "cuda": (ViewShape(16384, 512), ViewShape(4096, 512))},
        gate={"cpu": {"pairs": 2048}, "cuda": {"pairs": 8192}},
        shipped=(Shipped("N1024 D512", ViewShape(1024, 512)),),
    ),
)  # fmt: skip
