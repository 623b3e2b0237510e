"""Attention on a packed projection or on separate queries, keys and values.

The packed projection is [B, N, 3 H D] and the output [B, N, H D]. The kernels read and write these layouts directly,
so nothing is transposed or copied.

Per image and head, with scores s_ij = scale q_i . k_j (j <= i where causal; j < seqlen where lengths are given):

    p_ij = exp(s_ij - lse_i)        lse_i = logsumexp_j s_ij        o_i = sum_j p_ij v_j
    delta_i = do_i . o_i            ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j    dk_j = scale sum_i ds_ij q_i    dv_j = sum_i p_ij do_i

The gradient of a bias on the projection is the sum of dq, dk and dv over images and tokens. The gradient of the keys'
bias is zero, since a term that all keys of a query have in common does not change the softmax.

A head of N tokens moves 4 N D elements forward, and 7 N D (short), 8 N D (unrolled) or 12 N D and more (two phases)
backward. It takes 4 N^2 D FLOPs forward, and 10 N^2 D (short, unrolled) or 14 N^2 D (two phases) backward.
Method: FlashAttention (Dao et al. 2022) and FlashAttention-2 (Dao 2023).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backends import Op, planned_op, registered, uses_reference
from ..checks import check_bool, check_float, check_like, check_parameter, check_seqlens, check_tensor
from ..configs import HEAD_DIMS, planned
from ..dtypes import accumulate_dtype, autocast_to
from ..launch import arch_of, triton_runs_on
from ..packing import Packing, packing_for
from . import calls, launches

MAX_HEAD_DIM = 128


@registered("attention_fwd")
def _attention_fwd(
    qkv: Tensor, bias: Tensor | None, seqlens: Tensor | None, num_heads: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention on a packed projection. This is the registered op."""
    args = qkv, bias, seqlens, num_heads, causal, scale
    out, lse = calls.plan_forward(*args)(*args)
    return out, lse.contiguous()


_attention_fwd.planned_by(calls.plan_forward)


@_attention_fwd.register_fake
def _(
    qkv: Tensor, bias: Tensor | None, seqlens: Tensor | None, num_heads: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, length, width3 = qkv.shape
    lse = qkv.new_empty(batch, num_heads, length, dtype=accumulate_dtype(qkv.dtype))
    return qkv.new_empty(batch, length, width3 // 3), lse


@registered("attention_bwd")
def _attention_bwd(
    grad_out: Tensor, qkv: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor,
    num_heads: int, causal: bool, scale: float, with_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of a packed projection and of its bias. This is the registered op."""
    args = grad_out, qkv, seqlens, out, lse, num_heads, causal, scale, with_bias
    grad_qkv, grad_bias = calls.plan_backward(*args)(*args)
    return grad_qkv, lse.new_empty(0) if grad_bias is None else grad_bias


_attention_bwd.planned_by(calls.plan_backward)


@_attention_bwd.register_fake
def _(
    grad_out: Tensor, qkv: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor, num_heads: int, causal: bool,
    scale: float, with_bias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return qkv.new_empty(qkv.shape), lse.new_empty(qkv.shape[-1] if with_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the packed projection and the results for the backward pass."""
    qkv, bias, seqlens, *ctx.options = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, seqlens, *output)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of a packed projection and of its bias to autograd."""
    if grad_out is None:
        return (None,) * 6
    with_bias = ctx.needs_input_grad[1]
    grad_qkv, grad_bias = _call_backward(_attention_bwd, grad_out, ctx.saved_tensors, 1, (*ctx.options, with_bias))
    if with_bias and grad_bias.dtype is not ctx.bias_dtype:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return grad_qkv, grad_bias if with_bias else None, None, None, None, None


def _call_backward(
    op: Op, grad_out: Tensor, saved: tuple[Tensor | None, ...], index: int, options: tuple[Any, ...]
) -> Any:
    """Call a backward op of attention with the saved tensors; ``saved[index]`` holds the lengths, or is None."""
    tensors: Any = (grad_out, *saved)
    if saved[index] is None:
        tensors = (grad_out, *saved[:index], *saved[index + 1 :])
    args = grad_out, *saved, *options
    return (op.find(options, tensors) or op.learn(options, tensors, args))(*args)


_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


@registered("attention_qkv_fwd")
def _attention_qkv_fwd(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention on separate tensors. This is the registered op."""
    args = q, k, v, seqlens, causal, scale
    out, lse = calls.plan_qkv_forward(*args)(*args)
    return out, lse.contiguous()


_attention_qkv_fwd.planned_by(calls.plan_qkv_forward)


@_attention_qkv_fwd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    batch, m, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, m, dtype=accumulate_dtype(q.dtype))


_attention_qkv_bwd = planned_op("attention_qkv_bwd")(calls.plan_qkv_backward)


@_attention_qkv_bwd.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_qkv_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save queries, keys, values and the results for the backward pass."""
    q, k, v, seqlens, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, seqlens, *output)


def _qkv_backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of queries, keys and values to autograd."""
    if grad_out is None:
        return (None,) * 6
    grads = _call_backward(_attention_qkv_bwd, grad_out, ctx.saved_tensors, 3, tuple(ctx.options))
    return *grads, None, None, None


_attention_qkv_fwd.register_autograd(_qkv_backward, setup_context=_setup_qkv_context)


def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the softmax attention of every head, straight from the packed projection.

    Args:
        qkv: [B, N, 3 * num_heads * head_dim], the projections to queries, keys and values one after the other (the
            layout of ``nn.MultiheadAttention``'s ``in_proj``); float32, float16 or bfloat16 (float64 on the CPU); any
            strides. Under autocast it is taken in the autocast dtype.
        num_heads: heads; head_dim is at most 128 outside the reference.
        causal: token i sees tokens 0 .. i only.
        scale: positive factor on the scores, by default head_dim ** -0.5.
        seqlens: int32 or int64 [B], the number of tokens of each image, from the first one on, that are seen as keys. A
            token that sees no key gets zeros.
        cu_seqlens: int32 [B + 1], for sequences that lie behind one another in ``qkv`` [T, 3 * num_heads * head_dim]:
            sequence b has the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``. No sequence sees another. Tokens
            from ``cu_seqlens[-1]`` on belong to no sequence, and get zeros. A :class:`Packing` is checked once for all
            calls.
        bias: [3 * num_heads * head_dim], the bias that ``qkv`` contains already. It is not added, and only receives
            its gradient, which the backward pass has at hand: let ``qkv`` be ``F.linear(x, weight, bias.detach())``.
        backend: "auto" (on GPUs Triton, or PyTorch's own attention where :func:`attention_route` says so; on CPUs
            PyTorch's flash kernel), "triton", or "torch" for the reference.

    Returns:
        [B, N, num_heads * head_dim] in the dtype of ``qkv``, contiguous; [T, num_heads * head_dim] with
        ``cu_seqlens``.

    Raises:
        ValueError, TypeError: a shape, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention"
    if scale is not None:
        scale = float(scale)  # kept with the layout's plan; a tensor could change its value after that
    options = num_heads, num_heads.__class__, causal, causal.__class__, scale, backend
    if seqlens is None and cu_seqlens is None:
        compute = _attention_fwd.find((True, *options), (qkv,) if bias is None else (qkv, bias))
        if compute is not None:
            scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5 if scale is None else scale
            return compute(qkv, bias, None, num_heads, causal, scale)[0]
    _check_packed(op, qkv, num_heads, bias, 3 if cu_seqlens is None else 2)
    seqlens = _check_options(op, causal, scale, seqlens, cu_seqlens, qkv)
    qkv = autocast_to(qkv)
    if uses_reference(op, backend, qkv):
        return reference.attention(
            qkv, num_heads, causal=causal, scale=scale, seqlens=seqlens, cu_seqlens=cu_seqlens, bias=bias
        )
    head_dim = _check_head_dim(op, "qkv", qkv, qkv.shape[-1] // (3 * num_heads))
    scale = head_dim**-0.5 if scale is None else scale
    if cu_seqlens is not None:
        bounds = packing_for(op, cu_seqlens, qkv).bounds
        return _attention_fwd(qkv[None], bias, bounds, num_heads, causal, scale)[0][0]
    if takes_sdpa(backend, qkv.device, qkv.dtype, head_dim, qkv.shape[1], seqlens, causal):
        if bias is not None:
            qkv = reference.with_bias_gradient(qkv, bias)
        return _sdpa(*calls.views_of(qkv, num_heads), causal, scale).flatten(2)
    args = qkv, bias, seqlens, num_heads, causal, scale
    tensors = tuple([x for x in args[:3] if x is not None])
    return _attention_fwd.learn((seqlens is None, *options), tensors, args)(*args)[0]


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute softmax attention on separate tensors: cross-attention, a cache of keys, or a model that does not pack.

    Args:
        q: [B, M, H, D], float32, float16 or bfloat16 (float64 on the CPU); any strides, so that
            ``[B, H, M, D].transpose(1, 2)`` costs nothing. D is at most 128 outside the reference.
        k, v: [B, N, H, D], same dtype and device.
        causal: query i sees keys 0 .. i only.
        scale: positive factor on the scores, by default D ** -0.5.
        seqlens: int32 or int64 [B], the number of keys of each image, from the first one on, that are seen. A query
            that sees no key gets zeros.
        cu_seqlens: see :func:`attention`; q, k and v are [T, H, D] then.
        backend: see :func:`attention`.

    Returns:
        [B, M, H, D] in the dtype of ``q``, contiguous; [T, H, D] with ``cu_seqlens``.

    Raises:
        ValueError, TypeError: a shape, a dtype or a value that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention_qkv"
    if scale is not None:
        scale = float(scale)
    options = causal, causal.__class__, scale, backend
    if seqlens is None and cu_seqlens is None:
        compute = _attention_qkv_fwd.find((True, *options), (q, k, v))
        if compute is not None:
            return compute(q, k, v, None, causal, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(op, name, x, 4 if cu_seqlens is None else 3)
        check_like(op, name, x, "q", q)
    if cu_seqlens is not None and not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"{op}: with cu_seqlens, q, k and v must be [T, H, D], all of one shape, got {shapes}")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[-2:] != q.shape[-2:] or q.shape[-1] == 0:
        raise ValueError(
            f"{op}: q must be [B, M, H, D], k and v [B, N, H, D], with D of at least 1, got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    seqlens = _check_options(op, causal, scale, seqlens, cu_seqlens, q)
    q, k, v = (autocast_to(x) for x in (q, k, v))
    if uses_reference(op, backend, q):
        return reference.attention_qkv(q, k, v, causal=causal, scale=scale, seqlens=seqlens, cu_seqlens=cu_seqlens)
    head_dim = _check_head_dim(op, "q", q, q.shape[-1])
    scale = head_dim**-0.5 if scale is None else scale
    if cu_seqlens is not None:
        bounds = packing_for(op, cu_seqlens, q).bounds
        return _attention_qkv_fwd(q[None], k[None], v[None], bounds, causal, scale)[0][0]
    if takes_sdpa(backend, q.device, q.dtype, head_dim, k.shape[1], seqlens, causal):
        return _sdpa(q, k, v, causal, scale)
    tensors = (q, k, v) if seqlens is None else (q, k, v, seqlens)
    args = q, k, v, seqlens, causal, scale
    return _attention_qkv_fwd.learn((seqlens is None, *options), tensors, args)(*args)[0]


def takes_sdpa(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, num_keys: int, seqlens: Tensor | None,
    causal: bool,
) -> bool:  # fmt: skip
    """Return whether the tables of configurations say that PyTorch's own attention computes this call."""
    if backend != "auto" or seqlens is not None or not triton_runs_on(device):
        return False
    for largest, least in _least_keys_of_sdpa(device, dtype, causal):
        if head_dim <= largest:
            return least is not None and num_keys >= least
    return False


@planned
def _known_least_keys(device: torch.device, dtype: torch.dtype, causal: bool) -> tuple[tuple[int, int | None], ...]:
    """Return the result of :func:`_least_keys_of_sdpa`, which is computed once for each device and dtype."""
    arch = arch_of(device)
    return tuple((limit, launches.least_keys_of_sdpa(arch, dtype, limit, causal=causal)) for limit in HEAD_DIMS)


def _least_keys_of_sdpa(device: torch.device, dtype: torch.dtype, causal: bool) -> tuple[tuple[int, int | None], ...]:
    """Return for each limit of head dimensions the least number of keys for which PyTorch's own attention is used.

    The limits are those of the tables of configurations (``HEAD_DIMS``). A number is None if PyTorch's attention is
    never used.
    """
    return _known_least_keys(device, dtype, causal)


# torch.compile cannot trace the reading of the tables of configurations. With this attribute, it takes the result as a
# constant. torch.compiler.assume_constant_result sets it too, but a call of it imports the compiler in every process.
_least_keys_of_sdpa._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Compute attention [B, N, H, D] by PyTorch's scaled_dot_product_attention."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def _check_packed(op: str, qkv: Tensor, num_heads: int, bias: Tensor | None, ndim: int) -> None:
    """Refuse a packed projection or a bias whose shape does not fit the heads."""
    check_tensor(op, "qkv", qkv, ndim)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"{op}: num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"{op}: the last dimension of qkv must be 3 * num_heads * head_dim, "
            f"got {qkv.shape[-1]} with num_heads={num_heads}"
        )
    if bias is not None:
        check_parameter(op, "bias", bias, qkv)


def _check_options(
    op: str, causal: bool, scale: float | None, seqlens: Tensor | None, cu_seqlens: Tensor | Packing | None,
    like: Tensor,
) -> Tensor | None:  # fmt: skip
    """Refuse options of attention that do not fit, and return ``seqlens`` as the kernels take it: int32, or None."""
    check_bool(op, "causal", causal)
    if scale is not None and not scale > 0:
        raise ValueError(f"{op}: scale must be positive, got {scale}")
    if seqlens is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: seqlens and cu_seqlens exclude each other")
    return check_seqlens(op, seqlens, like)


def _check_head_dim(op: str, name: str, x: Tensor, head_dim: int) -> int:
    """Refuse a head dimension or a dtype that the attention kernels do not support."""
    check_float(op, **{name: x})
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}: use more heads or backend='torch'"
        )
    return head_dim
