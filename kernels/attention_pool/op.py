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
from ..backends import registered, uses_reference
from ..checks import check_float, check_like, check_seqlens, check_tensor
from ..dtypes import accumulate_dtype, autocast_to
from ..launch import triton_runs_on
from . import cpu, launches

MAX_HEADS, MAX_TOKENS = 64, 1024


def _plan_forward(query: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes attention pooling for a layout."""
    return (launches if triton_runs_on(query.device) else cpu).forward(query, *args)


def _plan_backward(grad_out: Tensor, *args: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes the gradients of attention pooling for a layout."""
    return (launches if triton_runs_on(grad_out.device) else cpu).backward(grad_out, *args)


@registered("attention_pool_fwd")
def _pool_fwd(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute attention pooling. This is the registered op."""
    return _plan_forward(query, tokens, seqlens)(query, tokens, seqlens)


_pool_fwd.planned_by(_plan_forward)


@_pool_fwd.register_fake
def _(query: Tensor, tokens: Tensor, seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=accumulate_dtype(query.dtype))


@registered("attention_pool_bwd")
def _pool_bwd(
    grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of attention pooling. This is the registered op."""
    args = grad_out, query, tokens, seqlens, lse
    return _plan_backward(*args)(*args)


_pool_bwd.planned_by(_plan_backward)


@_pool_bwd.register_fake
def _(grad_out: Tensor, query: Tensor, tokens: Tensor, seqlens: Tensor | None, lse: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), tokens.new_empty(tokens.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    """Save queries, tokens and lse of the pooling for the backward pass."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    """Return the gradients of queries and tokens to autograd."""
    if grad_out is None:
        return None, None, None
    args = grad_out, *ctx.saved_tensors
    tensors = (*args[:3], args[4]) if args[3] is None else args
    dq, dx = (_pool_bwd.find((), tensors) or _pool_bwd.learn((), tensors, args))(*args)
    return dq, dx, None


_pool_fwd.register_autograd(_backward, setup_context=_setup_context)


def attention_pool(query: Tensor, tokens: Tensor, *, seqlens: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Compute the softmax attention of a few queries on tokens, which are the keys and the values of every query.

    Args:
        query: [B, H, C], scaled already; float32, float16 or bfloat16 (float64 on the CPU); any strides. H is at most
            64 outside the reference. Under autocast it is taken in the autocast dtype.
        tokens: [B, N, C], same dtype and device; N is from 1 to 1,024 outside the reference.
        seqlens: int32 or int64 [B]: of each image only the first so many tokens are seen, and where that is none, the
            result is zero. Default: all.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [B, H, C]: for each query, the mean of the tokens by their weights.

    Raises:
        ValueError, TypeError: a shape or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    op = "attention_pool"
    if seqlens is None:
        compute = _pool_fwd.find((backend,), (query, tokens))
        if compute is not None:
            return compute(query, tokens, None)[0]
    check_tensor(op, "query", query, 3)
    check_tensor(op, "tokens", tokens, 3)
    check_like(op, "tokens", tokens, "query", query)
    if query.shape[::2] != tokens.shape[::2] or tokens.shape[1] == 0:
        raise ValueError(
            f"{op}: query must be [B, H, C] and tokens [B, N, C] with at least one token, "
            f"got {tuple(query.shape)} and {tuple(tokens.shape)}"
        )
    seqlens = check_seqlens(op, seqlens, query)
    query, tokens = autocast_to(query), autocast_to(tokens)
    if uses_reference(op, backend, query):
        return reference.attention_pool(query, tokens, seqlens=seqlens)
    check_float(op, query=query)
    if query.shape[1] > MAX_HEADS or tokens.shape[1] > MAX_TOKENS:
        raise ValueError(
            f"{op}: at most {MAX_HEADS} queries and {MAX_TOKENS} tokens, got {query.shape[1]} and {tokens.shape[1]}: "
            "use attention_qkv or backend='torch'"
        )
    args = query, tokens, seqlens
    tensors = (query, tokens) if seqlens is None else (query, tokens, seqlens)
    return _pool_fwd.learn((backend,), tensors, args)(*args)[0]
