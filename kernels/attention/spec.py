"""The specifications of both attention ops, on a packed projection and on separate tensors.

They list sizes, inputs, cases, floors, and the calls that the offline compiler compiles.
"""

import dataclasses
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..configs import HEAD_DIMS, NUM_KEYS, Config, LoopedConfig, ShortConfig, config_key, overrides
from ..spec import (
    CUDA,
    NOT_INTERPRETED,
    UNUSED,
    Call,
    Case,
    Draw,
    Floor,
    OpSpec,
    Shape,
    Shipped,
    Target,
    Tunable,
    cu_seqlens_of,
    lengths_of,
    on,
)
from .op import attention, attention_qkv


@dataclasses.dataclass(frozen=True)
class AttentionShape(Shape):
    """The sizes of a packed projection [batch, tokens, 3 heads head_dim], optionally with a bias and with lengths.

    If ``varlen``, ``batch`` sequences of at most ``tokens`` tokens are packed one after another.
    """

    batch: int
    tokens: int
    heads: int
    head_dim: int
    causal: bool = False
    lengths: bool = False
    varlen: bool = False
    bias: bool = True

    @property
    def elements(self) -> int:
        """The number of elements of the scores or of the projection, whichever is larger."""
        if self.varlen:
            lengths = lengths_of(self.batch, self.tokens)
            return self.heads * max(sum(n * n for n in lengths), 3 * self.head_dim * sum(lengths))
        return self.batch * self.heads * self.tokens * max(self.tokens, 3 * self.head_dim)


@dataclasses.dataclass(frozen=True)
class QkvShape(Shape):
    """Queries [batch, queries, heads, head_dim], and keys and values [batch, keys, heads, head_dim]."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    causal: bool = False
    lengths: bool = False

    @property
    def elements(self) -> int:
        """The number of elements of the scores, of the queries or of the keys, whichever is the largest."""
        m, n, head_dim = self.queries, self.keys, self.head_dim
        return self.batch * self.heads * max(m * n, m * head_dim, n * head_dim)


def draw_lengths(draw: Draw, batch: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Draw how many tokens of each image are seen as keys: more than there are, one, none, and then any number.

    Returns:
        Integers [batch] of ``dtype``.
    """
    lengths = draw.integers(0, tokens + 1, batch, dtype=dtype)
    for image, length in enumerate((tokens + 5, 1, 0)[:batch]):
        lengths[image] = length
    return lengths


def make(shape: AttentionShape, values: str, draw: Draw) -> Call:
    """Make a random packed projection for a case of attention; ``values`` names the kind of scores that it leads to."""
    width = shape.heads * shape.head_dim
    if shape.varlen:
        lengths = lengths_of(shape.batch, shape.tokens)
        total = sum(lengths) + UNUSED
        inputs = {"qkv": draw.normal(total, 3 * width), "cu_seqlens": cu_seqlens_of(lengths, draw)}
        if shape.bias:
            inputs["bias"] = draw.normal(3 * width)
        return Call(inputs, (draw.normal(total, width),), {"num_heads": shape.heads, "causal": shape.causal})
    qkv = draw.normal(shape.batch, shape.tokens, 3 * width)
    q, k = qkv[..., :width], qkv[..., width : 2 * width]
    if values == "one-hot":
        qkv[..., : 2 * width] *= 8
    elif values == "uniform":
        qkv[..., : 2 * width] *= 1e-4
    elif values == "duplicate rows":
        qkv = qkv[:, torch.arange(shape.tokens) // 2]
    elif values == "all-equal rows":
        qkv = qkv[:, :1].repeat(1, shape.tokens, 1)
    elif values == "large negative":
        q.fill_(10)
        k.div_(10).sub_(10)
    elif values == "large":
        qkv *= 30
    inputs = {"qkv": qkv}
    if shape.bias:
        inputs["bias"] = draw.normal(3 * width)
    if shape.lengths:
        inputs["seqlens"] = draw_lengths(draw, shape.batch, shape.tokens, torch.int64)
    grad = draw.normal(shape.batch, shape.tokens, width)
    return Call(inputs, (grad,), {"num_heads": shape.heads, "causal": shape.causal})


def make_qkv(shape: QkvShape, values: str, draw: Draw) -> Call:
    """Make random queries, keys and values; ``values`` names the kind of scores that they lead to."""
    factor = {"one-hot": 8.0, "uniform": 1e-4}.get(values, 1.0)
    inputs = {
        "q": factor * draw.normal(shape.batch, shape.queries, shape.heads, shape.head_dim),
        "k": factor * draw.normal(shape.batch, shape.keys, shape.heads, shape.head_dim),
        "v": draw.normal(shape.batch, shape.keys, shape.heads, shape.head_dim),
    }
    if shape.lengths:
        inputs["seqlens"] = draw_lengths(draw, shape.batch, shape.keys, torch.int32)
    grad = draw.normal(shape.batch, shape.queries, shape.heads, shape.head_dim)
    return Call(inputs, (grad,), {"causal": shape.causal})


def fused_reference(
    qkv: Tensor, num_heads: int, *, causal: bool = False, seqlens: Tensor | None = None,
    cu_seqlens: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the same as :func:`attention` with PyTorch's fused attention."""
    if bias is not None:
        qkv = reference.with_bias_gradient(qkv, bias)
    if cu_seqlens is not None:
        *parts, unused = qkv.tensor_split(cu_seqlens[1:].cpu().long())
        found = [fused_reference(x[None], num_heads, causal=causal)[0] for x in parts]
        return torch.cat([*found, 0 * unused[:, : unused.shape[1] // 3]])
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return fused_reference_qkv(q, k, v, causal=causal, seqlens=seqlens).flatten(2)


def fused_reference_qkv(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, seqlens: Tensor | None = None
) -> Tensor:
    """Compute the same as :func:`attention_qkv` with PyTorch's fused attention."""
    mask = None
    if seqlens is not None:
        keys = torch.arange(k.shape[1], device=k.device)
        # Each query sees at least one key, since PyTorch's fused kernels do not agree on the softmax over no keys.
        mask = (keys < seqlens.clamp(min=1)[:, None])[:, None, None]
        if causal:
            mask = mask & (keys <= torch.arange(q.shape[1], device=k.device)[:, None])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None).transpose(1, 2)
    return out if seqlens is None else out.masked_fill((seqlens == 0)[:, None, None, None], 0)


def floor(shape: AttentionShape, itemsize: int, backward: bool) -> Floor:
    """Count the least FLOPs and bytes of attention.

    The forward pass computes two matrix products. The backward pass recomputes one of them and needs four more.

    The forward pass reads q, k and v and writes the output. The backward pass reads q, k, v and the output's gradient,
    and writes three gradients. The output need not be read again: delta_i = do_i . o_i is the sum of p_ij (do_i . v_j)
    over the keys.
    """
    if shape.varlen:
        lengths = lengths_of(shape.batch, shape.tokens)
        one = dataclasses.replace(shape, batch=1, varlen=False)
        return sum((floor(one.changed(tokens=n), itemsize, backward) for n in lengths), start=Floor(0, 0))
    separate = QkvShape(shape.batch, shape.tokens, shape.tokens, shape.heads, shape.head_dim, shape.causal)
    return floor_qkv(separate, itemsize, backward)


def floor_qkv(shape: QkvShape, itemsize: int, backward: bool) -> Floor:
    """Count the least FLOPs and bytes of attention on separate tensors, as :func:`floor` does."""
    scores = shape.queries * shape.keys
    if shape.causal:
        # Query i sees keys 0 .. i. These scores form a triangle; queries after the last key see all keys.
        side = min(shape.queries, shape.keys)
        scores = side * (side + 1) // 2 + (shape.queries - side) * shape.keys
    product = 2 * shape.batch * shape.heads * scores * shape.head_dim
    query, key = (shape.batch * rows * shape.heads * shape.head_dim * itemsize for rows in (shape.queries, shape.keys))
    if backward:
        return Floor(5 * product, 3 * query + 4 * key)
    return Floor(2 * product, 2 * query + 2 * key)


def small_blocks(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Let the attention kernels take blocks of 16 rows, so that small cases have several blocks.

    The short kernels take up to 272 keys, and the looped kernels more. The unrolled kernel keeps its blocks of 64 rows.
    """
    small: dict[str, Config] = {}
    for head_dim in HEAD_DIMS:
        for num_keys in NUM_KEYS:
            for kernel in ("attention_short_fwd", "attention_short_bwd"):
                small[config_key(kernel, dtype, head_dim, num_keys)] = ShortConfig(16, num_warps=4, num_stages=1)
        for kernel in ("attention_varlen_fwd", "attention_varlen_query_bwd", "attention_varlen_key_bwd"):
            small[config_key(kernel, dtype, head_dim)] = LoopedConfig(16, 16, num_warps=4, num_stages=1)
        for kernel in ("attention_looped_fwd", "attention_query_bwd", "attention_key_bwd"):
            for limit in (None, *NUM_KEYS):
                small[config_key(kernel, dtype, head_dim, limit)] = LoopedConfig(16, 16, num_warps=4, num_stages=1)
    return overrides(small)


FEW = 6  # random draws of a case whose inputs are so small that PyTorch's error can be close to zero by chance

CASES = [
    *Case.in_use(AttentionShape(2, 50, 12, 64), AttentionShape(1, 50, 2, 64), "B/32's images", quick=True),
    *Case.in_use(AttentionShape(2, 77, 8, 64, True), AttentionShape(1, 77, 2, 64, True), "B's texts: crosses a tile under the causal mask", quick=True),
    Case(AttentionShape(1, 77, 20, 64, True), "bigG/14's texts", NOT_INTERPRETED),
    *Case.in_use(AttentionShape(1, 197, 12, 64), AttentionShape(1, 197, 1, 64), "B/16's images"),
    Case(AttentionShape(1, 257, 16, 64), "L/14's images", NOT_INTERPRETED),
    *Case.in_use(AttentionShape(1, 257, 16, 80), AttentionShape(1, 257, 1, 80), "H/14's images"),
    *Case.in_use(AttentionShape(1, 257, 16, 88), AttentionShape(1, 257, 1, 88), "g/14's images"),
    *Case.in_use(AttentionShape(1, 257, 16, 104), AttentionShape(1, 257, 1, 104), "bigG/14's images"),
    *Case.in_use(AttentionShape(1, 577, 4, 64), AttentionShape(1, 577, 1, 64), "L/14's images at 336 pixels, four heads"),
    Case(AttentionShape(64, 50, 12, 64), "B/32's images, a batch", on(CUDA)),
    Case(AttentionShape(64, 77, 8, 64, True), "B's texts, a batch", on(CUDA)),
    Case(AttentionShape(16, 577, 16, 64), "L/14's images at 336 pixels", on(CUDA)),
    Case(AttentionShape(16, 257, 16, 104), "bigG/14's images, a batch", on(CUDA)),
    # edge cases
    Case(AttentionShape(1, 1, 1, 64), "one token: softmax of one (PyTorch: eager or fused)", quick=True, draws=FEW, cancels=True, sanitize=True),
    Case(AttentionShape(2, 2, 1, 64, True), "two tokens under the mask"),
    Case(AttentionShape(3, 7, 1, 8, True), "less than any tile in both directions", sanitize=True),
    Case(AttentionShape(1, 31, 2, 32), "one token less than a small tile"),
    Case(AttentionShape(1, 63, 2, 64), "one token less than a tile"),
    Case(AttentionShape(1, 64, 2, 32, True), "exactly one tile; the small model's head_dim"),
    Case(AttentionShape(1, 65, 1, 80), "one token past a tile; H/14's head_dim, in parts of 64 and 16"),
    Case(AttentionShape(1, 33, 1, 104, True), "one token past a small tile; bigG/14's head_dim", quick=True, sanitize=True),
    Case(AttentionShape(1, 67, 3, 128), "prime tokens; the largest head_dim"),
    Case(AttentionShape(1, 140, 1, 16), "the bias's gradient is a sum over several blocks of queries and of keys"),
    Case(AttentionShape(1, 273, 1, 8, True), "one key more than any program holds", sanitize=True),
    Case(AttentionShape(0, 50, 2, 16), "no images"),
    Case(AttentionShape(3, 0, 2, 16, True), "no tokens"),
    # tokens that are hidden from a length on (seqlens)
    Case(AttentionShape(4, 50, 1, 16, lengths=True), "images that end early, or have no token (PyTorch: eager or fused)", cancels=True, quick=True, sanitize=True),
    Case(AttentionShape(4, 70, 1, 16, True, lengths=True), "texts that end early, past a tile (PyTorch: eager or fused)", cancels=True),
    # packed sequences of several lengths
    *Case.in_use(AttentionShape(16, 77, 8, 64, True, varlen=True), AttentionShape(8, 77, 1, 64, True, varlen=True), "B's texts, packed (PyTorch: eager or fused)", cancels=True, quick=True),
    Case(AttentionShape(1024, 77, 8, 64, True, varlen=True), "B's texts, packed, a batch", on(CUDA)),
    Case(AttentionShape(5, 150, 1, 80, varlen=True), "one long sequence, and short ones in one block (PyTorch: eager or fused)", cancels=True, sanitize=True),
    Case(AttentionShape(40, 9, 2, 24, varlen=True), "many sequences in a block (PyTorch: eager or fused)", cancels=True, quick=True, sanitize=True),
    Case(AttentionShape(33, 70, 1, 104, True, varlen=True), "packed, causal; a head_dim that is padded to 128 (PyTorch: eager or fused)", cancels=True, sanitize=True),
    Case(AttentionShape(0, 7, 2, 16, True, varlen=True), "no sequences: all tokens belong to none"),
    Case(AttentionShape(12, 40, 2, 32, True, varlen=True), "packed, first axis contiguous (PyTorch: eager or fused)", layout="transposed", cancels=True),
    Case(AttentionShape(2, 70, 2, 32, True), "first axis contiguous, causal", layout="transposed"),
    *Case.layouts(AttentionShape(2, 70, 2, 32), expanded=AttentionShape(2, 50, 2, 16)),
    Case.extreme(AttentionShape(1, 77, 1, 64, True), "one-hot", "queries and keys times 8: each softmax is one-hot", quick=True),
    Case.extreme(AttentionShape(1, 77, 1, 64), "uniform", "times 1e-4: each softmax is flat"),
    Case.extreme(AttentionShape(1, 70, 2, 32), "duplicate rows", "every token occurs twice: equal weights"),
    Case.extreme(AttentionShape(1, 70, 2, 32), "all-equal rows", "all tokens equal: the output is the value (PyTorch: eager or fused)", draws=FEW, cancels=True),
    Case.extreme(AttentionShape(1, 50, 1, 64), "large negative", "all scores near -800: padded keys must not win with 0 (PyTorch: eager or fused)", cancels=True),
    Case.extreme(AttentionShape(1, 50, 1, 64), "large", "queries, keys and values of 30: scores of thousands", draws=24, quick=True),
    *Case.repeats(AttentionShape(2, 77, 2, 64, True), AttentionShape(64, 257, 16, 64)),
    *Case.repeats(AttentionShape(40, 77, 2, 64, True, varlen=True), AttentionShape(1024, 77, 8, 64, True, varlen=True)),
]  # fmt: skip

# With few queries and a narrow head, PyTorch's eager error would be smaller than the rounding error of the log-sum-exp,
# from which every fused attention computes its gradients. So these cases have wider heads.
QKV_CASES = [
    *Case.in_use(QkvShape(2, 1, 196, 12, 64), QkvShape(1, 1, 196, 1, 64), "SigLIP B/16's pool: one query for all tokens of an image", quick=True),
    *Case.in_use(QkvShape(1, 76, 255, 12, 64), QkvShape(1, 76, 255, 1, 64), "CoCa's texts on the tokens of an image"),
    Case(QkvShape(1, 256, 257, 8, 96), "CoCa L/14's pool: 256 queries", NOT_INTERPRETED),
    Case(QkvShape(64, 76, 255, 12, 64), "CoCa's texts, a batch", on(CUDA)),
    Case(QkvShape(2, 77, 77, 8, 64, True), "B's texts, not packed", NOT_INTERPRETED),
    # edge cases
    Case(QkvShape(1, 1, 1, 1, 64), "one of everything (PyTorch: eager or fused)", draws=FEW, cancels=True),
    Case(QkvShape(2, 2, 33, 2, 64), "a key past a small tile, two queries", sanitize=True),
    Case(QkvShape(2, 2, 33, 2, 64, True), "most keys are seen by no query, one query sees one key (PyTorch: eager or fused)", draws=FEW, quick=True, cancels=True),
    Case(QkvShape(2, 50, 17, 3, 24), "more queries than keys", quick=True),
    Case(QkvShape(2, 50, 17, 3, 24, True), "more queries than keys: the last ones see all of them", sanitize=True),
    Case(QkvShape(1, 17, 130, 2, 64), "fewer queries than keys, past a tile of keys"),
    Case(QkvShape(1, 17, 130, 2, 64, True), "fewer queries than keys: whole tiles of keys are seen by no query"),
    Case(QkvShape(1, 3, 290, 1, 64), "more keys than any program holds, less than a tile of queries", sanitize=True),
    Case(QkvShape(0, 5, 9, 2, 16), "no images"),
    Case(QkvShape(2, 0, 9, 2, 16), "no queries: gradients of keys and values are zero"),
    # tokens that are hidden from a length on (seqlens)
    Case(QkvShape(5, 17, 50, 1, 64, lengths=True), "keys that end early, or are none (PyTorch: eager or fused)", cancels=True, quick=True, sanitize=True),
    Case(QkvShape(5, 50, 33, 1, 64, True, lengths=True), "keys that end early, under the causal mask (PyTorch: eager or fused)", cancels=True),
    *Case.layouts(QkvShape(2, 17, 33, 2, 64), expanded=QkvShape(2, 17, 33, 2, 64)),
    Case.extreme(QkvShape(1, 65, 77, 1, 64), "one-hot", "queries and keys times 8: each softmax is one-hot"),
    Case.extreme(QkvShape(1, 65, 77, 1, 64), "uniform", "times 1e-4: each softmax is flat"),
    *Case.repeats(QkvShape(2, 50, 77, 2, 64), QkvShape(64, 76, 255, 12, 64)),
]  # fmt: skip

# One layer of L/14, of B's texts, of B/16, B/32, H/14 and of L/14 at 336 pixels: tokens, heads, head_dim, causal.
LAYERS = (257, 16, 64, False), (77, 8, 64, True), (197, 12, 64, False), (50, 12, 64, False), (257, 16, 80, False), (577, 16, 64, False)  # fmt: skip
BATCHES = {"cpu": 8, "cuda": 256}
CAPTIONS = {"cpu": 32, "cuda": 1024}  # captions of B's texts, packed
BOTH = ("bf16", "fp32")
SHIPPED = (
    # 64 is the head_dim of all texts, of B and of L; 80 of H/14, 88 of g/14, 104 of bigG/14, and 32 of the small model
    *(
        Shipped(f"N{tokens} D{head_dim}", AttentionShape(2, tokens, 16, head_dim), BOTH)
        for tokens, head_dim in ((257, 64), (257, 80), (257, 88), (257, 104))
    ),
    Shipped("N17 D32", AttentionShape(2, 17, 16, 32), BOTH, small_tiles=True),
    # fp16 is compiled at one shape only, since it takes the configurations of bf16.
    Shipped("N77 D64 causal", AttentionShape(2, 77, 16, 64, True), (*BOTH, "fp16")),
    Shipped("varlen D64 causal", AttentionShape(64, 77, 16, 64, True, varlen=True), BOTH),
    Shipped("varlen D104", AttentionShape(64, 257, 16, 104, varlen=True)),
    Shipped("varlen D80", AttentionShape(64, 257, 16, 80, varlen=True), BOTH),
    # The lengths of B/32, B/16, and L/14 at 336 pixels. In float32, they take the same kernels as other lengths.
    *(Shipped(f"N{tokens} D64", AttentionShape(2, tokens, 16, 64)) for tokens in (50, 197, 577)),
)
LONG = tuple(
    Tunable(f"attention_{kernel}", f"_{kernel}_kernel", LoopedConfig)
    for kernel in ("looped_fwd", "query_bwd", "key_bwd")
)
VARLEN = tuple(
    Tunable(f"attention_varlen_{kernel}", f"_varlen_{kernel}_kernel", LoopedConfig, any_length=True)
    for kernel in ("fwd", "query_bwd", "key_bwd")
)
SHORT = (
    Tunable("attention_short_bwd", "_short_bwd_kernel", ShortConfig),
    Tunable("attention_short_fwd", "_short_fwd_kernel", ShortConfig),
)
UNROLLED = Tunable("attention_unrolled_bwd", "_unrolled_bwd_kernel", ShortConfig, {"block_m": (64,)})
KERNELS = (
    "_short_fwd_kernel", "_short_bwd_kernel", "_unrolled_bwd_kernel",
    "_looped_fwd_kernel", "_query_bwd_kernel", "_key_bwd_kernel",
    "_varlen_fwd_kernel", "_varlen_query_bwd_kernel", "_varlen_key_bwd_kernel",
)  # fmt: skip

SPECS = (
    OpSpec(
        op=attention,
        reference=reference.attention,
        make=make,
        cases=CASES,
        # These shapes have no bias: qkv contains it already, so gradcheck would expect its gradient to be zero.
        small=(
            AttentionShape(2, 9, 2, 8, True, bias=False),
            AttentionShape(5, 6, 2, 8, True, varlen=True, bias=False),
            AttentionShape(2, 9, 2, 8, lengths=True, bias=False),
        ),
        category="attention",
        kernels=KERNELS,
        floor=floor,
        bench={
            device: (
                *(AttentionShape(batch, *layer) for layer in LAYERS),
                AttentionShape(CAPTIONS[device], 77, 8, 64, True, varlen=True),
            )
            for device, batch in BATCHES.items()
        },
        items=("batch", "sequences"),
        frozen=("bias",),
        shipped=SHIPPED,
        targets=(
            Target("attention-64", AttentionShape(64, 577, 16, 64), LONG),
            Target("attention-128", AttentionShape(64, 577, 16, 104), LONG),
            Target("attention-50", AttentionShape(1024, 50, 12, 64), SHORT),
            Target("attention-77", AttentionShape(1024, 77, 8, 64, True), (UNROLLED, SHORT[1])),
            Target("attention-varlen", AttentionShape(1024, 77, 8, 64, True, varlen=True), VARLEN),
            Target("attention-257", AttentionShape(256, 257, 16, 64), LONG[:2]),
        ),
        small_tiles=small_blocks,
        fused=fused_reference,
    ),
    OpSpec(
        op=attention_qkv,
        reference=reference.attention_qkv,
        make=make_qkv,
        cases=QKV_CASES,
        small=(QkvShape(2, 5, 9, 3, 8), QkvShape(2, 5, 9, 3, 8, True, lengths=True)),
        category="attention",
        kernels=KERNELS,
        floor=floor_qkv,
        # SigLIP's towers pool the tokens of an image by one query.
        bench={device: (QkvShape(batch, 1, 196, 12, 64),) for device, batch in BATCHES.items()},
        items=("batch", "sequences"),
        small_tiles=small_blocks,
        fused=fused_reference_qkv,
    ),
)
