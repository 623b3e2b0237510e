"""Attention pooling: a few queries as wide as the tokens, which are keys and values at once.

Per image, with queries q [H, C] and tokens x [N, C]:

    p_hn = exp(q_h . x_n - lse_h)       lse_h = logsumexp_n q_h . x_n       o_h = sum_n p_hn x_n
    dp_hn = do_h . x_n                  ds_hn = p_hn (dp_hn - sum_m p_hm dp_hm)
    dq_h = sum_n ds_hn x_n              dx_n = sum_h p_hn do_h + ds_hn q_h

CLIP's ResNets pool with one query per head. There a head's key projection can be folded into its query, and its value
projection can be applied to the pooled tokens. With C = 2048 and N = 50 this takes one fiftieth of the products. If
only one row of a transformer's output is read, the attention of its last block is a pooling as well. In a causal
transformer, that row sees only the tokens up to its own.

The kernels read the tokens twice in the forward pass, the second time from the cache, and twice in the backward pass.
FLOPs: 4 B H N C forward, 10 B H N C backward.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import reference
from ..backends import planned_op, uses_reference
from ..checks import check_float, check_like, check_seqlens, check_tensor
from ..dtypes import accumulate_dtype, autocast_to
from ..launch import triton_runs_on
from ..packing import Packing, cu_seqlens_for, host_reads, runs_of
from . import cpu, launches

MAX_HEADS, MAX_TOKENS = 64, 1024


@planned_op("attention_pool_fwd")
def _pool_fwd(
    query: Tensor, tokens: Tensor, seqlens: Tensor | None, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes attention pooling for tensors laid out like these; with ``max_seqlen``, for
    packed sequences of any layout.

    Then the tokens are [1, T, C], and ``seqlens`` are the cumulative lengths [B + 1].
    """
    plan = (launches if triton_runs_on(query.device) else cpu).forward
    if max_seqlen is None:
        return plan(query, tokens, seqlens)
    return lambda *args: plan(*args)(*args)  # each call has another number of tokens


@_pool_fwd.register_fake
def _(query: Tensor, tokens: Tensor, seqlens: Tensor | None, max_seqlen: int | None = None) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))


@planned_op("attention_pool_bwd")
def _pool_bwd(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, max_seqlen: int | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the gradients of attention pooling, for tensors as in ``_pool_fwd``."""
    plan = (launches if triton_runs_on(query.device) else cpu).backward
    if max_seqlen is None:
        return plan(grad_out, query, tokens, seqlens, lse)
    return lambda *args: plan(*args)(*args)


@_pool_bwd.register_fake
def _(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), tokens.new_empty(tokens.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save queries, tokens and lse of the pooling for the backward pass."""
    *tensors, ctx.max_seqlen = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Return the gradients of attention pooling's queries and tokens to autograd."""
    if grad_out is None:
        return (None,) * 4
    tensors, options = (grad_out, *ctx.saved_tensors), (ctx.max_seqlen,)
    given = (*tensors[:3], tensors[4]) if tensors[3] is None else tensors
    args = *tensors, *options
    dq, dx = (_pool_bwd.find(options, given) or _pool_bwd.learn(options, given, args))(*args)
    return dq, dx, None, None


_pool_fwd.register_autograd(_backward, setup_context=_setup_context)


def attention_pool(
    query: Tensor,
    tokens: Tensor,
    *,
    seqlens: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the softmax attention of a few queries on tokens, which are the keys and the values of every query.

    Args:
        query: [B, H, C], scaled already; float32, float16 or bfloat16 (float64 on the CPU); any strides. H is at most
            64 outside the reference. Under autocast it is taken in the autocast dtype.
        tokens: [B, N, C], same dtype and device; N is from 1 to 1,024 outside the reference.
        seqlens: int32 or int64 [B], the number of tokens of each image, from the first one on, that are seen; by
            default all. The result of an image without tokens is zero.
        cu_seqlens: int32 [B + 1] or a :class:`Packing`, for sequences of several lengths that lie behind one another
            in ``tokens`` [T, C], as :func:`attention` takes them. The queries ``query[b]`` see only the tokens of
            sequence b; if it has none, their result is zero. Tokens of no sequence are not read, and get a gradient of
            zero.
        max_seqlen: with ``cu_seqlens``, the length of the longest sequence or more, at most 1,024 outside the
            reference. It is an int, since the host would have to wait for a number that is on a GPU.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, H, C]: for each query, the mean of the tokens by their weights.

    Raises:
        ValueError, TypeError: a shape, a dtype or an option that does not fit; on a CPU also ``cu_seqlens`` that fall,
            or do not run from 0 to T at most, and a sequence longer than ``max_seqlen``. On a GPU the check would have
            to wait for the device. There only the first ``max_seqlen`` tokens of a sequence are seen, other wrong
            values give wrong results, and nothing outside the tensors is read or written.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention_pool"
    if cu_seqlens is not None or max_seqlen is not None:
        if cu_seqlens is not None and seqlens is not None:
            raise ValueError(f"{op}: seqlens and cu_seqlens exclude each other")
        return _attention_pool_packed(query, tokens, cu_seqlens, max_seqlen, backend)
    if seqlens is None:
        compute = _pool_fwd.find((backend,), (query, tokens))
        if compute is not None:
            return compute(query, tokens, None, None)[0]
    _check_tensors(query, tokens, is_packed=False)
    seqlens = check_seqlens(op, seqlens, query)
    query, tokens = autocast_to(query), autocast_to(tokens)
    if uses_reference(op, backend, query):
        return reference.attention_pool(query, tokens, seqlens=seqlens)
    _check_sizes(query, tokens.shape[1])
    args = query, tokens, seqlens, None
    tensors = (query, tokens) if seqlens is None else (query, tokens, seqlens)
    return _pool_fwd.learn((backend,), tensors, args)(*args)[0]


def _attention_pool_packed(
    query: Tensor, tokens: Tensor, cu_seqlens: Tensor | Packing | None, max_seqlen: int | None, backend: str
) -> Tensor:
    """Compute attention pooling of packed sequences, as :func:`attention_pool` documents it."""
    op = "attention_pool"
    _check_tensors(query, tokens, is_packed=True)
    if cu_seqlens is None or isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int):
        raise TypeError(
            f"{op}: cu_seqlens and max_seqlen must be given together, max_seqlen as an int, "
            f"got {type(cu_seqlens).__name__} and {type(max_seqlen).__name__}"
        )
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen must not be negative, got {max_seqlen}")
    ends = cu_seqlens_for(op, cu_seqlens, len(query), tokens)
    query, tokens = autocast_to(query), autocast_to(tokens)
    if uses_reference(op, backend, query):
        if host_reads(ends):
            runs_of(op, ends, len(tokens), max_seqlen)
        return reference.attention_pool(query, tokens, cu_seqlens=ends, max_seqlen=max_seqlen)
    _check_sizes(query, max_seqlen)
    pooled: Tensor = _pool_fwd(query, tokens[None], ends, max_seqlen)[0]
    return pooled


def _check_tensors(query: Tensor, tokens: Tensor, *, is_packed: bool) -> None:
    """Refuse queries and tokens whose types, shapes or devices do not fit together."""
    op = "attention_pool"
    check_tensor(op, "query", query, 3)
    check_tensor(op, "tokens", tokens, 2 if is_packed else 3)
    check_like(op, "tokens", tokens, "query", query)
    has_tokens = is_packed or (len(query) == len(tokens) and tokens.shape[1] > 0)
    if query.shape[2] != tokens.shape[-1] or not has_tokens:
        expected = "[T, C] with cu_seqlens" if is_packed else "[B, N, C] with at least one token"
        raise ValueError(
            f"{op}: query must be [B, H, C] and tokens {expected}, got {tuple(query.shape)} and {tuple(tokens.shape)}"
        )


def _check_sizes(query: Tensor, most: int) -> None:
    """Refuse a dtype, or more queries or tokens of an image or sequence, than the kernels take."""
    check_float("attention_pool", query=query)
    if query.shape[1] > MAX_HEADS or most > MAX_TOKENS:
        raise ValueError(
            f"attention_pool: at most {MAX_HEADS} queries and {MAX_TOKENS} tokens, got {query.shape[1]} and {most}: "
            "use attention_qkv or backend='torch'"
        )
