"""Ranks for recall@k, blockwise: the M x N scores of images and texts never exist.

With features x [M, D], y [N, D], scores s_ij = x_i . y_j, and o_j the image that text j belongs to:

    text rank_j  = #{i : i != o_j, not s_ij < s_(o_j)j}
    image rank_i = #{j : o_j != i, not s_ij < b_i}        b_i = max over o_j = i of s_(o_j)j

A tie counts against, and so does NaN, which is less than nothing. For ties to be exact, a score must have the same bits
wherever it is computed: the own scores come from tiles of the same shape and arithmetic as all others, with images
gathered so that the pairs lie on the diagonal.

FLOPs: 2 M N D, and 2 N T D for the own scores, T the side of a tile. Memory beyond the inputs: O(M + N), on the CPU a
few tiles more.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backends import outside_autocast, uses_reference
from .checks import check_float, check_like, check_tensor
from .common import slices
from .configs import GemmConfig, gemm_config
from .dtypes import accumulate_dtype, dtype_name
from .launch import arch_of, launch, triton_runs_on
from .spec import (
    CPU,
    CUDA,
    DETERMINISM,
    EXTREME,
    NOT_INTERPRETED,
    Call,
    Case,
    Draw,
    Floor,
    OpSpec,
    Shape,
    Shipped,
    Target,
    Tunable,
    on,
)  # fmt: skip
from .tiles import grouped_tile

SPAN = 1024  # texts that one program compares with its images: fewer atomics than with a program for each tile
TILE = 768  # side of a tile on the CPU: its scores and marks stay in cache
TILE_UNIT = 192  # a multiple of the rows and columns that any BLAS keeps in registers


@triton.jit
def _scores(
    x_rows,  # [BM] pointers
    y_rows,  # [BN] pointers
    mask_m,  # [BM]
    mask_n,  # [BN]
    D,
    stride_xd, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of x y^T [BM, BN]: both kernels take it from here, so that equal rows have equal bits in both."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, D, BLOCK_K):
        dims = start_k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = dims < D
        x = tl.load(
            x_rows[:, None] + dims[None, :] * stride_xd, mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )  # [BM, BK]
        y = tl.load(
            y_rows[None, :] + dims[:, None] * stride_yd, mask=mask_n[None, :] & mask_k[:, None], other=0.0
        )  # [BK, BN]
        acc = tl.dot(x, y, acc, input_precision="ieee")
    return acc


@triton.jit
def _own_score_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    owner_ptr,  # [N] int32, -1: of no image
    score_ptr,  # [N] fp32
    N, D,
    stride_xm, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Score of each text with its own image: the diagonal of a tile, PAIRS = min(BLOCK_M, BLOCK_N) of them."""
    first = tl.program_id(0) * PAIRS
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = first + tl.arange(0, BLOCK_N)
    owner = tl.load(owner_ptr + offs_m, mask=offs_m < N, other=-1)  # [BM]
    acc = _scores(
        x_ptr + owner.to(tl.int64) * stride_xm, y_ptr + offs_n.to(tl.int64) * stride_yn, owner >= 0, offs_n < N,
        D, stride_xd, stride_yd, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    score = tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], acc, 0.0), 0)  # [BN]
    tl.store(score_ptr + offs_n, score, mask=offs_n < tl.minimum(first + PAIRS, N))


@triton.jit
def _count_ahead_kernel(
    x_ptr,  # [M, D]
    y_ptr,  # [N, D]
    owner_ptr,  # [N] int32, -1: of no image
    image_best_ptr,  # [M] fp32
    text_best_ptr,  # [N] fp32
    image_ahead_ptr,  # [M] int32, zeros
    text_ahead_ptr,  # [N] int32, zeros
    M, N, D,
    stride_xm, stride_xd, stride_yn, stride_yd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPAN: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Others that come before the best own one, for BLOCK_M images and SPAN texts, added up in integers: the order in
    which programs add does not matter.
    """
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, SPAN), GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m.to(tl.int64) * stride_xm  # [BM]
    image_best = tl.load(image_best_ptr + offs_m, mask=mask_m, other=0.0)
    image_ahead = tl.zeros((BLOCK_M,), tl.int32)
    for start_n in range(pid_n * SPAN, tl.minimum(pid_n * SPAN + SPAN, N), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y_rows = y_ptr + offs_n.to(tl.int64) * stride_yn  # [BN]
        acc = _scores(x_rows, y_rows, mask_m, mask_n, D, stride_xd, stride_yd, BLOCK_M, BLOCK_N, BLOCK_K)  # [BM, BN]
        text_best = tl.load(text_best_ptr + offs_n, mask=mask_n, other=0.0)
        owner = tl.load(owner_ptr + offs_n, mask=mask_n, other=-1)
        others = ((owner[None, :] != offs_m[:, None]) & mask_m[:, None] & mask_n[None, :]).to(tl.int32)
        image_ahead += tl.sum(tl.where(acc < image_best[:, None], 0, others), 1)
        text_ahead = tl.sum(tl.where(acc < text_best[None, :], 0, others), 0)
        tl.atomic_add(text_ahead_ptr + offs_n, text_ahead, mask=mask_n, sem="relaxed")
    tl.atomic_add(image_ahead_ptr + offs_m, image_ahead, mask=mask_m, sem="relaxed")


def _ahead_triton(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), n, device = image.shape, len(text), image.device
    cfg = gemm_config("retrieval_ranks", arch_of(device), image.dtype)
    blocks = {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "BLOCK_K": cfg.block_k}
    owner32, strides = owner.to(torch.int32), (*image.stride(), *text.stride())
    own = torch.empty(n, dtype=torch.float32, device=device)
    pairs = min(cfg.block_m, cfg.block_n)
    launch(
        _own_score_kernel, (triton.cdiv(n, pairs),), image, text, owner32, own, n, d, *strides,
        config=cfg, device=device, PAIRS=pairs, **blocks,
    )  # fmt: skip
    ahead = torch.zeros(m, dtype=torch.int32, device=device), torch.zeros(n, dtype=torch.int32, device=device)
    launch(
        _count_ahead_kernel, (triton.cdiv(m, cfg.block_m) * triton.cdiv(n, SPAN),),
        image, text, owner32, *_best(own, owner, m), *ahead, m, n, d, *strides,
        config=cfg, device=device, SPAN=SPAN, GROUP_M=8, **blocks,
    )  # fmt: skip
    return ahead


def _ahead_cpu(image: Tensor, text: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    (m, d), n = image.shape, len(text)
    # Every product has one shape, of whole register blocks: BLAS sums what is left over at an edge in another order.
    side = min(TILE, triton.cdiv(max(min(m, n), 1), TILE_UNIT) * TILE_UNIT)
    x, y = image.new_zeros(2, side, d, dtype=accumulate_dtype(image.dtype))
    scores, marks = x.new_empty(2, side, side)
    own, one = x.new_empty(n), x.new_ones(())
    for texts in (owner >= 0).nonzero().squeeze(1).split(side):
        x[: len(texts)], y[: len(texts)] = image[owner[texts]], text[texts]
        own[texts] = torch.mm(x, y.T, out=scores).diagonal()[: len(texts)]
    image_best, text_best = _best(own, owner, m)
    image_ahead, text_ahead = owner.new_full((m,), n), owner.new_full((n,), m)
    for images in slices(m, side):
        rows = images.stop - images.start
        x[:rows] = image[images]
        for texts in slices(n, side):
            columns = texts.stop - texts.start
            y[:columns] = text[texts]
            tile, mark = torch.mm(x, y.T, out=scores)[:rows, :columns], marks[:rows, :columns]
            row = owner[texts] - images.start
            column = ((row >= 0) & (row < rows)).nonzero().squeeze(1)
            pairs = row[column], column
            # 1 for what is not ahead: own pairs, and worse scores; sums of ones are exact
            behind = torch.lt(tile, image_best[images, None], out=mark).index_put_(pairs, one)
            image_ahead[images] -= behind.sum(1).long()
            behind = torch.lt(tile, text_best[texts], out=mark).index_put_(pairs, one)
            text_ahead[texts] -= behind.sum(0).long()
    return image_ahead, text_ahead


def _slots(owner: Tensor, num_images: int) -> Tensor:
    """Index of each text's image, with one place more for texts of no image."""
    return owner.masked_fill(owner < 0, num_images)


def _best(own: Tensor, owner: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
    """Best own score of each image and each text; -inf, which nothing is worse than, where there is none but NaN."""
    text_best = own.masked_fill((owner < 0) | own.isnan(), float("-inf"))
    image_best = own.new_full((num_images + 1,), float("-inf"))
    return image_best.scatter_reduce_(0, _slots(owner, num_images), text_best, "amax")[:num_images], text_best


def _check_indices(op: str, text_image: Tensor, num_images: int) -> None:
    """Refuse an index that is no image's. On a GPU that would wait for the device: there it is a text of no image."""
    if text_image.device.type != "cpu":
        return
    wrong = (text_image < -1) | (text_image >= num_images)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(
            f"{op}: text_image must hold indices of the {num_images} images, or -1 for a text of none, "
            f"got {text_image[place].item()} at {place}"
        )


@torch.library.custom_op("clipfast::retrieval_ranks", mutates_args=(), device_types=("cuda", "cpu"))
@outside_autocast
def _retrieval_ranks(image: Tensor, text: Tensor, text_image: Tensor) -> tuple[Tensor, Tensor]:
    m = len(image)
    _check_indices("retrieval_ranks", text_image, m)
    owner = text_image.where((text_image >= 0) & (text_image < m), -1)
    ahead = _ahead_triton if triton_runs_on(image.device) else _ahead_cpu
    image_ahead, text_ahead = ahead(image, text, owner)
    has_text = torch.zeros(m + 1, dtype=torch.bool, device=owner.device).index_fill_(0, _slots(owner, m), True)[:m]
    return image_ahead.long().where(has_text, -1), text_ahead.long().where(owner >= 0, -1)


@_retrieval_ranks.register_fake
def _(image: Tensor, text: Tensor, text_image: Tensor) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape[0], dtype=torch.int64), image.new_empty(text.shape[0], dtype=torch.int64)


def retrieval_ranks(
    image: Tensor, text: Tensor, *, text_image: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Ranks of images and texts in each other's results, for recall@k, without the M x N scores.

    The score of a pair is the product of its features: the cosine, if they have unit length. The rank of a text is the
    number of images other than its own that score at least as high as its own; the rank of an image is the number of
    texts that are not its own and score at least as high as its best own one. 0 is a hit at rank 1. A tie counts
    against, so that a collapsed model, for which all scores are equal, gets no credit; equal features tie to the last
    bit. A score that is NaN counts against too: as another's it comes before, as one's own it comes last.

    Args:
        image: image features [M, D], float32, float16 or bfloat16 (float64 on the CPU); any strides. Autocast does not
            change them. No gradient.
        text: text features [N, D], same dtype and device as ``image``.
        text_image: int64 [N], the image that each text belongs to: an image may have several texts, or none. -1 is a
            text of no image, which can only be in the way. Default: text i belongs to image i, and M is N.
        backend: "auto" (Triton on GPUs, blockwise PyTorch on CPUs), "triton", or "torch" for the full-matrix reference.

    Returns:
        Ranks of images [M] and of texts [N], int64; -1 for an image without texts and a text without an image.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit together; on the CPU, an index that is no
            image's (on a GPU, where to look would be to wait, it means -1).
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "retrieval_ranks"
    check_tensor(op, "image", image, 2)
    check_tensor(op, "text", text, 2)
    check_like(op, "text", text, "image", image)
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{op}: image and text must have the same width, got {tuple(image.shape)} and {tuple(text.shape)}"
        )
    owner = _owner_tensor(op, text_image, image, text)
    if uses_reference(op, backend, image):
        if not torch.compiler.is_compiling():
            _check_indices(op, owner, len(image))
        return reference.retrieval_ranks(image.detach(), text.detach(), text_image=owner)
    check_float(op, "image", image)
    return _retrieval_ranks(image.detach(), text.detach(), owner)


def _owner_tensor(op: str, text_image: Tensor | None, image: Tensor, text: Tensor) -> Tensor:
    if text_image is None:
        if len(image) != len(text):
            raise ValueError(
                f"{op}: without text_image there must be as many texts as images, got {len(text)} and {len(image)}"
            )
        return torch.arange(len(text), device=text.device)
    if not isinstance(text_image, Tensor):
        raise TypeError(f"{op}: text_image must be a torch.Tensor, got {type(text_image).__name__}")
    if text_image.dtype != torch.int64:
        raise TypeError(f"{op}: text_image must be int64, got {dtype_name(text_image.dtype)}")
    if text_image.shape != text.shape[:1]:
        raise ValueError(f"{op}: text_image must be [{len(text)}], one per text, got {tuple(text_image.shape)}")
    if text_image.device != image.device:
        raise ValueError(f"{op}: text_image is on {text_image.device}, but image is on {image.device}")
    return text_image


@dataclasses.dataclass(frozen=True)
class RankShape(Shape):
    """Features of images [images, embed_dim] and of texts [texts, embed_dim]."""

    images: int
    texts: int
    embed_dim: int

    @property
    def elements(self) -> int:
        """The number of scores."""
        return self.images * self.texts


def make(shape: RankShape, values: str, draw: Draw) -> Call:
    """Make features of small whole numbers, whose products are exact in any order and often tie, and an image or none
    for each text. With the values "unit", features have unit length and texts belong to images in turn.
    """
    sizes = (shape.images, shape.embed_dim), (shape.texts, shape.embed_dim)
    if values == "unit":
        image, text = (draw.unit(*size) for size in sizes)
        owner = torch.arange(shape.texts, device=draw.device) % shape.images
    else:
        image, text = (draw.integers(-2, 3, *size).float() for size in sizes)
        owner = draw.integers(-1, shape.images, shape.texts)
    if values == "all-equal rows":
        image, text = (x[:1].repeat(len(x), 1) for x in (image, text))
    elif values == "infinite":
        image[3, 1], text[7, 2], text[9] = float("inf"), float("-inf"), 0.0
    elif values == "nan":
        image[3, 1] = text[7, 2] = text[9] = float("nan")
    return Call({"image": image, "text": text, "text_image": owner})


def floor(shape: RankShape, itemsize: int, backward: bool) -> Floor:
    """Count one product, the features that are read and the ranks that are written; there is no backward pass."""
    if backward:
        return Floor(0, 0)
    rows = shape.images + shape.texts
    return Floor(2 * shape.images * shape.texts * shape.embed_dim, rows * (shape.embed_dim * itemsize + 8))


@contextmanager
def small_tiles(dtype: torch.dtype) -> Iterator[None]:
    """Let two programs add to the same images, and let a CPU take several tiles."""
    global SPAN, TILE
    before = SPAN, TILE
    SPAN, TILE = 128, TILE_UNIT
    try:
        yield
    finally:
        SPAN, TILE = before


CASES = [
    Case(RankShape(1, 1, 1), "a pair: nothing else can be ahead"),
    Case(RankShape(1, 1, 16), "a pair of usual features", sanitize=True),
    Case(RankShape(1, 37, 8), "one image: the rank of a text can only be 0"),
    Case(RankShape(5, 2, 3), "images without texts"),
    Case(RankShape(64, 64, 64), "exactly one fp32 tile"),
    Case(RankShape(67, 201, 40), "prime, three texts for each image, a width that no tile divides", quick=True),
    Case(RankShape(130, 129, 72), "one and two past the 16-bit tile"),
    Case(RankShape(67, 150, 24), "two programs that add to the same images", sanitize=True),
    Case(RankShape(600, 411, 6), "several tiles, all of them cut off at an edge"),
    Case(RankShape(3, 4, 0), "features of no dimensions: all scores are 0"),
    Case(RankShape(0, 5, 8), "no images"),
    Case(RankShape(5, 0, 8), "no texts"),
    Case(RankShape(0, 0, 8), "nothing"),
    Case(RankShape(1000, 5000, 512), "Flickr30k's test set", NOT_INTERPRETED),
    Case(RankShape(5000, 25000, 512), "COCO's test set", on(CUDA)),
    # layouts
    Case(RankShape(67, 201, 40), "features of one dimension side by side", layout="transposed"),
    Case(RankShape(67, 201, 40), "every second column of a wider tensor", layout="sliced", quick=True),
    Case(RankShape(67, 201, 40), "one element past an aligned address", layout="offset"),
    # extremes
    Case(RankShape(71, 213, 40), "collapsed features: all tie", check=EXTREME, values="all-equal rows", quick=True),
    Case(RankShape(20, 50, 4), "scores that are infinite, or NaN", check=EXTREME, values="infinite"),
    Case(RankShape(20, 50, 4), "features that are NaN", check=EXTREME, values="nan", quick=True),
    # repeats
    Case(RankShape(600, 411, 24), "several tiles, two threads", on(CPU), DETERMINISM, values="unit", quick=True),
    Case(RankShape(5000, 25000, 512), "many programs add to an image", on(CUDA), DETERMINISM, values="unit"),
]

SPECS = (
    OpSpec(
        op=retrieval_ranks,
        reference=reference.retrieval_ranks,
        make=make,
        cases=CASES,
        small=(RankShape(7, 11, 6),),
        category="other",
        suite="retrieval",
        kernels=("_own_score_kernel", "_count_ahead_kernel"),
        floor=floor,
        # the test sets of Flickr30k and COCO have five captions for an image
        bench={"cpu": (RankShape(1000, 5000, 512),), "cuda": (RankShape(1000, 5000, 512), RankShape(5000, 25000, 512))},
        bench_values="unit",
        items=("texts", "texts"),
        follows_autocast=False,
        # rows in whole tiles, and rows of which none is aligned
        shipped=(
            Shipped("M1024 N5120 D512", RankShape(1024, 5120, 512), ("bf16", "fp32", "fp16")),
            Shipped("M1001 N5005 D512", RankShape(1001, 5005, 512)),
        ),
        targets=(
            Target(
                "retrieval_ranks",
                RankShape(5120, 25600, 512),
                (Tunable("retrieval_ranks", "_count_ahead_kernel", GemmConfig),),
            ),
        ),
        small_tiles=small_tiles,
    ),
)
