"""The reference implementation of each op in plain PyTorch, which specifies the results of the kernels.

The functions have the signatures of the ops, take any floating dtype, and use autograd in every step. With
float64 input, a function here gives the result that counts as exact. With the op's own dtype, its error determines how
large the op's error may be.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import accumulate_dtype
from .fp8_rows import E4M3, Fp8Rows, Fp8Weight, rounded
from .grids import places_of, resizing_weights
from .packing import Packing, packing_for

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def contrastive_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, *, normalize: bool = False, offset: int = 0
) -> Tensor:
    """Return the reference of the contrastive loss: over the full logits (Radford et al. 2021, figure 3)."""
    return pairwise_loss(image, text, logit_scale, both=True, normalize=normalize, offset=offset)


def pairwise_loss(
    rows: Tensor, cols: Tensor, logit_scale: Tensor | float, *, both: bool, normalize: bool, offset: int
) -> Tensor:
    """Return the reference cross-entropy of pairs (i, i + offset) over rows; with ``both``, of rows and columns."""
    if normalize:
        rows, cols = F.normalize(rows, dim=-1), F.normalize(cols, dim=-1)
    logits = _wide(logit_scale * (rows @ cols.T))
    start = max(0, -offset)
    of_rows = torch.arange(start, max(start, min(len(rows), len(cols) - offset)), device=logits.device)
    of_cols = of_rows + offset
    loss = _cross_entropy(logits[of_rows], of_cols)
    return (loss + _cross_entropy(logits.T[of_cols], of_rows)) / 2 if both else loss


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype in which the reference accumulates: float32, or float64 for float64."""
    return x.to(accumulate_dtype(x.dtype))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the reference cross-entropy of logits and labels, as ``F.cross_entropy`` does.

    In float64, it is log(1 + sum of exp(other logit - logit of the label)), whose relative error stays small for losses
    far below the rounding error of 1.
    """
    if logits.dtype != torch.float64:
        return F.cross_entropy(logits, labels)
    positive = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    return torch.logaddexp(others - positive.squeeze(1), others.new_zeros(())).mean()


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor | float,
    *,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = False,
) -> Tensor:
    """Return the reference of the op ``info_nce_loss``: each query's own key against other candidates.

    These are the other keys (van den Oord et al. 2018, equation 4), the ``negatives`` (He et al. 2020, algorithm 1), or
    both.
    """
    if negatives is None:
        negatives = key[:0]
    if normalize:
        query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
    own = torch.arange(len(query), device=query.device)
    candidates, labels = (query @ key.T, own) if in_batch else ((query * key).sum(1, keepdim=True), 0 * own)
    logits = logit_scale * torch.cat([candidates, query @ negatives.T], dim=1)
    return _cross_entropy(_wide(logits), labels)


def nt_xent_loss(first: Tensor, second: Tensor, logit_scale: Tensor | float, *, normalize: bool = True) -> Tensor:
    """Return the reference of the op ``nt_xent_loss``, by Chen et al. 2020, equation 1."""
    views = torch.cat([first, second])
    if normalize:
        views = F.normalize(views, dim=-1)
    logits = _wide(logit_scale * (views @ views.T))
    own = torch.arange(len(views), device=views.device)
    logits = logits.masked_fill(own[:, None] == own, float("-inf"))
    return _cross_entropy(logits, own.roll(len(first)))


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    offset: int = 0,
) -> Tensor:
    """Return the reference of the op ``sigmoid_loss``, SigLIP's loss in plain PyTorch (Zhai et al. 2023, equation 1).

    It is the binary cross-entropy of every image with every text, summed over texts and averaged over images.
    """
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    logits = _wide(logit_scale * (image @ text.T)) + logit_bias
    images, texts = (torch.arange(len(x), device=image.device) for x in (image, text))
    is_pair = (images + offset)[:, None] == texts
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum() / len(image)


def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the reference of the op ``attention``: softmax attention on a packed projection (Vaswani et al. 2017)."""
    if bias is not None:
        qkv = with_bias_gradient(qkv, bias)
    # The last size is given, since reshape cannot infer a -1 from an empty batch.
    q, k, v = qkv.reshape(*qkv.shape[:-1], 3, num_heads, qkv.shape[-1] // (3 * num_heads)).unbind(-3)
    return attention_qkv(q, k, v, causal=causal, scale=scale, seqlens=seqlens, cu_seqlens=cu_seqlens).flatten(-2)


def with_bias_gradient(qkv: Tensor, bias: Tensor) -> Tensor:
    """Return the values of ``qkv``, which include ``bias`` already, and connect them to ``bias`` for autograd."""
    return qkv + (bias - bias.detach()).to(qkv.dtype)


def attention_qkv(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None,
    seqlens: Tensor | None = None, cu_seqlens: Tensor | Packing | None = None,
) -> Tensor:  # fmt: skip
    """Compute softmax attention of queries [B, M, H, D] on keys and values [B, N, H, D], or on packed ones [T, H, D].

    Packed sequences are computed one by one.
    """
    if cu_seqlens is not None:
        ends = packing_for("attention", cu_seqlens, q).cu_seqlens.tolist()
        parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
        found = [attention_qkv(q[None, i], k[None, i], v[None, i], causal=causal, scale=scale)[0] for i in parts]
        nothing = torch.ones((), dtype=torch.bool, device=q.device)
        return torch.cat([*found, q[ends[-1] :].masked_fill(nothing, 0)])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    if causal:
        hidden = torch.ones_like(hidden).triu(1)
    if seqlens is not None:
        hidden = hidden | (torch.arange(k.shape[2], device=k.device) >= seqlens[:, None])[:, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    # The softmax over no keys is NaN, but a query that sees no key must return zeros.
    return (weights.masked_fill(hidden.all(-1, keepdim=True), 0) @ v).transpose(1, 2)


def attention_pool(
    query: Tensor, tokens: Tensor, *, seqlens: Tensor | None = None, cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:  # fmt: skip
    """Compute the reference attention of queries [B, H, C] on tokens [B, N, C] that are keys and values at once.

    Packed tokens [T, C] are first padded to ``max_seqlen`` tokens for each sequence.
    """
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.clamp(0, len(tokens))
        places = cu_seqlens[:-1, None] + torch.arange(max_seqlen, device=tokens.device)
        tokens, seqlens = F.pad(tokens, (0, 0, 0, max_seqlen))[places], cu_seqlens.diff()
    if seqlens is None:
        return (query @ tokens.transpose(1, 2)).softmax(-1) @ tokens
    hidden = torch.arange(tokens.shape[1], device=tokens.device) >= seqlens[:, None]
    tokens = tokens.masked_fill(hidden[..., None], 0)
    weights = (query @ tokens.transpose(1, 2)).masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    # The softmax over no tokens is NaN, but a query that sees no token must return zeros.
    return weights.masked_fill(hidden.all(-1)[:, None, None], 0) @ tokens


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None) -> Any:
    """Compute the reference of the op ``layer_norm``: normalise x + residual (Ba et al. 2016), in float32 at least."""
    stream = x if residual is None else (x + residual).to(residual.dtype)
    work = accumulate_dtype(stream.dtype)
    y = F.layer_norm(stream.to(work), x.shape[-1:], weight.to(work), bias.to(work), eps).to(x.dtype)
    return y if residual is None else (y, stream)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return the reference of the op ``bias_gelu``: the exact GELU (Hendrycks and Gimpel 2016) of x + bias."""
    return F.gelu(_wide(x) + _wide(bias)).to(x.dtype)


def bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return the reference of the op ``bias_quick_gelu``: u sigmoid(1.702 u) of u = x + bias."""
    u = _wide(x) + _wide(bias)
    return (u * torch.sigmoid(1.702 * u)).to(x.dtype)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    keep: Tensor | None = None,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Return the reference of the op ``patch_embed``: a strided convolution with class token and positions.

    This is equation 1 of Dosovitskiy et al. (2021). With ``keep``, only the class token and the patches with these
    numbers are returned.
    """
    if images.dtype == torch.uint8:
        images = normalize_uint8(images, mean, std, weight.dtype)
    patches = F.conv2d(images.to(weight.dtype), weight, stride=weight.shape[-1])
    class_token = class_embedding.to(weight.dtype).expand(len(images), 1, -1)
    tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)
    tokens = tokens + positional_embedding.to(weight.dtype)
    if keep is None:
        return tokens
    rows = F.pad(keep.long() + 1, (1, 0))  # row 0 is the class token
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))


def patch_embed_packed(
    patches: Tensor,
    grids: Tensor,
    weight: Tensor,
    positional_embedding: Tensor,
    *,
    cu_seqlens: Tensor | Packing,
    bias: Tensor | None = None,
    prefix: Tensor | None = None,
    interpolation: str = "bilinear",
    keep_aspect: bool = False,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Tensor:
    """Return the reference of the op ``patch_embed_packed``: a linear layer with resized positions added.

    The prefix tokens of an image stand before the tokens of its patches (Beyer et al. 2023, section 3.2).
    """
    dtype = weight.dtype
    prefix = weight.new_zeros(0, len(weight)) if prefix is None else prefix.to(dtype)
    packing = packing_for(
        "patch_embed_packed", cu_seqlens, patches.new_empty(len(patches) + len(prefix) * len(grids), 0)
    )
    places = places_of(packing.bounds, packing.sequence, grids, len(patches), len(prefix))
    if patches.dtype == torch.uint8:
        pixels = patches.unflatten(1, (-1, len(mean))).transpose(1, 2)[..., None]
        patches = normalize_uint8(pixels, mean, std, dtype).transpose(1, 2).flatten(1)
    of_patches = F.pad(patches.to(dtype), (0, 0, 0, 1))[places.row]
    tokens = F.linear(of_patches, weight, None if bias is None else bias.to(dtype))
    table = _wide(positional_embedding)
    rows, columns = resizing_weights(places, table.shape[:2], interpolation, keep_aspect, table.dtype)
    tokens = tokens + torch.einsum("ti,tj,ije->te", rows, columns, table).to(dtype)
    tokens = tokens.masked_fill((places.row == len(patches))[:, None], 0)
    return tokens + F.pad(prefix, (0, 0, 1, 0))[places.prefix + 1]


def text_embed(
    text: Tensor,
    token_embedding: Tensor,
    positional_embedding: Tensor,
    *,
    cu_seqlens: Tensor | Packing | None = None,
) -> Tensor:
    """Return the reference of the op ``text_embed``: rows of a table plus positions (Vaswani et al. 2017, 3.4 and 3.5).

    Packed texts are [T].
    """
    if cu_seqlens is None:
        return F.embedding(text, token_embedding) + positional_embedding[: text.shape[1]].to(token_embedding.dtype)
    positions = torch.arange(len(text), device=text.device) - packing_for("text_embed", cu_seqlens, text).bounds[0]
    tokens = F.embedding(text, token_embedding)
    tokens = tokens + positional_embedding[positions.clamp(min=0)].to(token_embedding.dtype)
    return tokens.masked_fill((positions < 0)[:, None], 0)


def normalize_uint8(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the reference's pixels ``(images / 255 - mean) / std`` of uint8 [B, C, H, W], in float32 at least."""
    work = accumulate_dtype(dtype)
    mean_c, std_c = (_per_channel(values, work, images.device) for values in (mean, std))
    return ((images.to(work) / 255 - mean_c) / std_c).to(dtype)


def _per_channel(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the mean or the std of each channel as a tensor of the reference that broadcasts to images."""
    # The values are filled in on the device: a copy from the host cannot be captured in a CUDA graph.
    return torch.stack([torch.full((1, 1), value, dtype=dtype, device=device) for value in values])


def retrieval_ranks(image: Tensor, text: Tensor, *, text_image: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the reference of the op ``retrieval_ranks``: how many candidates that do not match score as high as the
    best match or higher.

    All scores are computed at once, in float32 at least. An image or text that has no match gets -1.
    """
    scores = _wide(image) @ _wide(text).T
    images = torch.arange(len(image), device=image.device)
    owner = images if text_image is None else text_image
    own = images[:, None] == owner
    # One more row and column of -inf let amax accept an empty matrix.
    own_scores = F.pad(scores.where(own & ~scores.isnan(), float("-inf")), (0, 1, 0, 1), value=float("-inf"))
    image_best, text_best = own_scores.amax(1, keepdim=True)[:-1], own_scores.amax(0)[:-1]
    # In contrast to score >= best, this is also true for NaN, so that NaN counts as ahead too.
    image_ranks = (~own & ~(scores < image_best)).sum(1)
    text_ranks = (~own & ~(scores < text_best)).sum(0)
    return image_ranks.where(own.any(1), -1), text_ranks.where(own.any(0), -1)


def top_k(query: Tensor, items: Tensor, k: int, *, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the reference of the op ``top_k``: the k highest scores of each query; -inf and -1 where there are fewer.

    All scores are computed at once, in float32 at least, and sorted. The first of equal scores comes first.
    """
    scores = _wide(query) @ _wide(items).T
    hidden = scores.isnan() if allowed is None else scores.isnan() | ~allowed
    scores = F.pad(scores.masked_fill(hidden, float("-inf")), (0, max(0, k - len(items))), value=float("-inf"))
    scores, indices = (x[:, :k] for x in scores.sort(dim=1, descending=True, stable=True))
    return scores, indices.masked_fill(scores == float("-inf"), -1)


def quantize_rows(x: Tensor, dtype: torch.dtype = E4M3) -> Fp8Rows:
    """Return the reference of the op ``quantize_rows``: rows in 8 bits, whose gradient passes as if nothing was
    rounded.
    """
    return Fp8Rows(*rounded(x.detach(), dtype), (x - x.detach()).nan_to_num(0.0))


def bias_gelu_fp8(x: Tensor, bias: Tensor) -> Fp8Rows:
    """Return the reference of the op ``bias_gelu_fp8``: GELU of x + bias in 8 bits, rounded once."""
    return _rounded_from(x, bias_gelu(_wide(x), bias))


def bias_quick_gelu_fp8(x: Tensor, bias: Tensor) -> Fp8Rows:
    """Return the reference of the op ``bias_quick_gelu_fp8``: QuickGELU of x + bias in 8 bits, rounded once."""
    return _rounded_from(x, bias_quick_gelu(_wide(x), bias))


def layer_norm_fp8(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Any:
    """Return the reference of the op ``layer_norm_fp8``: the layer norm in 8 bits, rounded once from float32."""
    y = layer_norm(_wide(x), weight, bias, eps, residual=residual)
    y, stream = (y, None) if residual is None else y
    rows = _rounded_from(x, y)
    return rows if stream is None else (rows, stream)


def _rounded_from(x: Tensor, y: Tensor) -> Fp8Rows:
    """Return ``y``, computed in float32 by a reference from ``x``, in 8 bits, with the dtype of ``x`` for products."""
    values, scale, carrier = quantize_rows(y)
    return Fp8Rows(values, scale, None if carrier is None else carrier.to(x.dtype))


def quantize_weight(weight: Tensor) -> Fp8Weight:
    """Return the reference of the op ``quantize_weight``: the rows and the columns of a weight [N, K] in 8 bits."""
    weight = weight.detach()
    return Fp8Weight(Fp8Rows(*rounded(weight, E4M3)), Fp8Rows(*rounded(weight.T, E4M3)))


def fp8_linear(
    x: Tensor | Fp8Rows, weight: Tensor, bias: Tensor | None = None, *, recipe: str = "switchback",
    weight_fp8: Fp8Weight | None = None,
) -> Tensor:  # fmt: skip
    """Return the reference of the op ``fp8_linear``: products of operands in 8 bits, which are exact in float32.

    Two terms with the value zero are added to the output. Through them, autograd computes the gradients of the input
    and of the weight from the operands that the op multiplies (Wortsman et al. 2023).
    """
    rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
    of_rows, of_columns = weight_fp8 or quantize_weight(weight)
    wide = rows.wide()
    connected = wide if rows.carrier is None else wide + rows.carrier  # the carrier takes the gradient
    input_term = _round_gradient(connected @ of_columns.wide(), -1)
    if recipe == "full":
        columns = wide.flatten(0, -2).T
        operand = Fp8Rows(*rounded(columns, E4M3)).wide().T.reshape(wide.shape)
        weight_term = _round_gradient(operand @ _wide(weight).T, 0)
    else:
        weight_term = wide @ _wide(weight).T
    y = wide @ of_rows.wide().T
    y = y + (input_term - input_term.detach()) + (weight_term - weight_term.detach())
    return (y if bias is None else y + bias).to(rows.dtype)


def _round_gradient(x: Tensor, axis: int) -> Tensor:
    """Return ``x``, whose gradient is rounded to 8 bits: by rows if ``axis`` is -1, else by columns.

    In float64, nothing is rounded.
    """
    if x.dtype == torch.float64:
        return x
    apply: Any = _RoundGradient.apply
    found: Tensor = apply(x, axis)
    return found


class _RoundGradient(torch.autograd.Function):
    """The identity, whose gradient [..., N] is rounded to 8 bits with a scale for each row, or for each column."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axis: int) -> Tensor:  # noqa: ARG004
        """Return ``x`` unchanged; a gradient has a scale for each row if ``axis`` is -1, else for each column."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:  # noqa: ARG004
        """Keep the axis for the backward pass of ``fp8_linear``."""
        ctx.axis = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Round the gradient of ``fp8_linear`` to 8 bits."""
        rows = grad if ctx.axis else grad.flatten(0, -2).T
        rows = Fp8Rows(*rounded(rows, E4M3)).wide()
        return (rows if ctx.axis else rows.T.reshape(grad.shape)), None
