"""Functions that compute attention for one layout: the shapes, strides, dtype and device of an op's tensors.

The ``plan_`` functions choose the kernels of a layout once, and return a function for all calls with that layout. That
function passes a packed projection to the kernels as three addresses in its memory, since making three views of it
would take the host as long as the launch.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..backends import below_autograd
from ..common import contiguous_strides, new_tensors
from ..launch import Plan, Start, triton_runs_on
from . import cpu, varlen_cpu, varlen_launches
from .launches import BackwardPlan, backward_plan, forward_plan, grad_of_bias, head_parts

# The addresses of the queries, keys and values of a call, and a function that returns them as tensors.
Places = tuple[tuple[int, int, int], Callable[[], tuple[Tensor, Tensor, Tensor]]]


def views_of(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values [B, N, H, D] as views of a packed projection."""
    batch, length, width = qkv.shape
    q, k, v = qkv.view(batch, length, 3, num_heads, width // (3 * num_heads)).unbind(2)
    return q, k, v


def _varlen(x: Tensor, seqlens: Tensor | None) -> ModuleType | None:
    """Return the module that computes attention on packed sequences on the device of ``x``.

    For packed sequences, ``seqlens`` is [2, T], the bounds of their :class:`Packing`. Otherwise it is None or [B], and
    this function returns None.
    """
    if seqlens is None or seqlens.ndim != 2:
        return None
    return varlen_launches if triton_runs_on(x.device) else varlen_cpu


def _varlen_forward(
    varlen: Any, qkv: Tensor, bias: Tensor | None, bounds: Tensor, num_heads: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention on the projection [1, T, 3 * H * D] of T tokens, which hold several packed sequences."""
    out, lse = varlen.forward(*views_of(qkv, num_heads), bounds, causal, scale)
    return out.flatten(2), lse


def _varlen_backward(
    varlen: Any, grad_out: Tensor, qkv: Tensor, bounds: Tensor, out: Tensor, lse: Tensor,
    num_heads: int, causal: bool, scale: float, with_bias: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of the projection [1, T, 3 * H * D] of packed sequences, and of its bias."""
    views, grad_qkv = views_of(qkv, num_heads), qkv.new_empty(qkv.shape)
    grad_out, out = grad_out.reshape(views[0].shape), out.view(views[0].shape)
    grads = views_of(grad_qkv, num_heads)
    grad_bias = varlen.backward(grad_out, *views, out, lse, bounds, causal, scale, grads, with_bias)
    return grad_qkv, grad_bias


def _varlen_qkv_forward(
    varlen: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention on the queries, keys and values [1, T, H, D] of packed sequences."""
    results: tuple[Tensor, Tensor] = varlen.forward(*_with_near_heads(q, k, v), bounds, causal, scale)
    return results


def _varlen_qkv_backward(
    varlen: Any, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of the queries, keys and values [1, T, H, D] of packed sequences."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    near = _with_near_heads(grad_out, q, k, v)
    varlen.backward(*near, out, lse, bounds, causal, scale, grads, False)
    return grads


def plan_forward(
    qkv: Tensor, bias: Tensor | None, seqlens: Tensor | None, num_heads: int, causal: bool, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes attention on packed projections with the layout of ``qkv``."""
    varlen = _varlen(qkv, seqlens)
    if varlen is not None:
        return functools.partial(_varlen_forward, varlen)
    if not triton_runs_on(qkv.device):
        # The output can be a view of the result of PyTorch's flash kernel, and autograd must not record this view.
        return below_autograd(cpu.forward_packed(qkv, seqlens, num_heads, causal, scale))
    step = qkv.shape[-1] // 3 * qkv.stride(-1) * qkv.itemsize  # bytes from a query to its key
    out_shape = *qkv.shape[:2], qkv.shape[-1] // 3
    compute = _forward(*views_of(qkv, num_heads), seqlens, causal, scale, out_shape)

    def run(
        qkv: Tensor,
        bias: Tensor | None,
        seqlens: Tensor | None,
        heads: int,
        causal: bool,
        scale: float,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute attention on a packed projection of the planned layout; write the results to ``out``."""
        return compute(_places(qkv, step, num_heads), seqlens, out)

    return run


def _places(qkv: Tensor, step: int, num_heads: int) -> Places:
    """Return the :data:`Places` of queries, keys and values in a packed projection, ``step`` bytes apart."""
    at = qkv.data_ptr()
    return (at, at + step, at + 2 * step), functools.partial(views_of, qkv, num_heads)


def plan_backward(
    grad_out: Tensor, qkv: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor,
    num_heads: int, causal: bool, scale: float, with_bias: bool,
) -> Callable[..., tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Return the function that computes the gradients of packed projections with the layout of ``qkv``, and of their
    bias.
    """
    varlen = _varlen(qkv, seqlens)
    if varlen is not None:
        return functools.partial(_varlen_backward, varlen)
    if not triton_runs_on(qkv.device):
        return cpu.backward_packed(qkv, seqlens, num_heads, causal, scale, with_bias)
    views, width = views_of(qkv, num_heads), qkv.shape[-1] // 3
    step, grad_step = width * qkv.stride(-1) * qkv.itemsize, width * qkv.itemsize
    new_grad = new_tensors(qkv)
    grad_strides = (*contiguous_strides(qkv.shape)[:2], views[0].shape[-1], 1)
    compute = _backward(
        grad_out.reshape(views[0].shape), *views, seqlens, causal, scale, (grad_strides,) * 3, with_bias
    )

    def run(
        grad_out: Tensor, qkv: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of qkv, the packed projection that attention gets, and of the projection's bias."""
        grad_qkv = new_grad()
        places = _places(qkv, step, num_heads), _places(grad_qkv, grad_step, num_heads)
        grad_bias = compute(grad_out, places[0], out, lse, seqlens, places[1])
        return grad_qkv, grad_bias

    return run


def plan_qkv_forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes attention on separate tensors with the layouts of ``q``, ``k`` and ``v``."""
    varlen = _varlen(q, seqlens)
    if varlen is not None:
        return functools.partial(_varlen_qkv_forward, varlen)
    if not triton_runs_on(q.device):
        return below_autograd(cpu.forward)
    compute = _forward(q, k, v, seqlens, causal, scale, q.shape)

    def run(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
        """Compute attention on separate queries, keys and values of the planned layout."""
        return compute(_places_of(q, k, v), seqlens)

    return run


def _places_of(q: Tensor, k: Tensor, v: Tensor) -> Places:
    """Return the :data:`Places` of separate queries, keys and values."""
    return (q.data_ptr(), k.data_ptr(), v.data_ptr()), lambda: (q, k, v)


def plan_qkv_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor,
    causal: bool, scale: float,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Return the function that computes attention's gradients of separate tensors with the layouts of ``q``, ``k`` and
    ``v``.
    """
    varlen = _varlen(q, seqlens)
    if varlen is not None:
        return functools.partial(_varlen_qkv_backward, varlen)
    new_grads = [new_tensors(x) for x in (q, k, v)]
    is_triton = triton_runs_on(q.device)
    if is_triton:
        grad_strides = tuple([contiguous_strides(x.shape) for x in (q, k, v)])
        compute = _backward(grad_out, q, k, v, seqlens, causal, scale, grad_strides, False)

    def run(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, out: Tensor, lse: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of attention with respect to separate queries, keys and values."""
        dq, dk, dv = (new() for new in new_grads)
        if is_triton:
            compute(grad_out, _places_of(q, k, v), out, lse, seqlens, _places_of(dq, dk, dv))
        else:
            cpu.backward(grad_out, q, k, v, out, lse, seqlens, causal, scale, (dq, dk, dv))
        return dq, dk, dv

    return run


def _forward(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float, out_shape: tuple[int, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Plan attention on tensors with the layouts of ``q``, ``k`` and ``v``.

    Returns:
        The function that computes attention from the :data:`Places` of q, k and v and from the lengths. It returns the
        output with ``out_shape``, and the log-sum-exp of the scaled scores, divided by ``scale``, [B, H, M]. Its third
        argument, if given, has the memory for both.
    """
    has_near_heads, has_seqlens = _have_near_heads(q, k, v), seqlens is not None
    batch, m, heads, _ = q.shape
    new_out, new_lse = new_tensors(q, out_shape), new_tensors(q, (batch, heads, m), torch.float32)

    def plan(q: Tensor, k: Tensor, v: Tensor, is_aligned: bool) -> tuple[Plan, bool, int]:
        """Plan the forward kernel of attention for these queries, keys and values."""
        return forward_plan(
            q.device, q.dtype, q.shape, k.shape[1], (q.stride(), k.stride(), v.stride()), has_seqlens, causal,
            scale, is_aligned,
        )  # fmt: skip

    found, walks, block_n = plan(q, k, v, True)
    # A kernel with tensor descriptors is planned in each call: the alignment of the addresses decides whether it may
    # use descriptors.
    start = Start(found) if has_near_heads and not block_n else None
    absent = (0,) * 4 if walks else ()

    def compute(
        places: Places, seqlens: Tensor | None, results: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute attention on queries, keys and values at these addresses."""
        addresses, tensors = places
        out, lse = results or (new_out(), new_lse())
        if start is None:
            q, k, v = _with_near_heads(*tensors())
            found, walks, block_n = plan(q, k, v, _are_aligned(k, v))
            found.start(q, k, v, *(_tiles(block_n, k, v) if walks else ()), out, lse, seqlens)
        elif not start.at(*addresses, *absent, out.data_ptr(), lse.data_ptr(), _address(seqlens)):
            start(*tensors(), *[None] * len(absent), out, lse, seqlens)
        return out, lse

    return compute


def _address(x: Tensor | None) -> int:
    """Return the address of a tensor as an argument of an attention kernel; 0 for None."""
    return 0 if x is None else x.data_ptr()


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, causal: bool, scale: float,
    grad_strides: tuple[tuple[int, ...], ...], with_sums: bool,
) -> Callable[..., Tensor | None]:  # fmt: skip
    """Plan the gradients of attention on tensors with the layouts of the arguments.

    ``grad_strides`` are the strides of dq, dk and dv, in which the heads of a token must be contiguous.

    Returns:
        The function that writes the gradients. Its arguments are the upstream gradient, the :data:`Places` of q, k and
        v, the output, the log-sum-exp, the lengths, and the :data:`Places` of the gradients. It returns the gradient of
        a bias on the projection in float32, [3 * H * D]: the sums over batch and tokens of dq and of dv, and zeros
        between them. Unless ``with_sums``, it returns None.
    """
    has_near_heads, has_seqlens = _have_near_heads(q, k, v, grad_out), seqlens is not None

    def plan(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, is_aligned: bool) -> BackwardPlan:
        """Plan the backward kernels of attention for these queries, keys and values."""
        return backward_plan(
            q.device, q.dtype, q.shape, k.shape[1], (q.stride(), k.stride(), v.stride(), grad_out.stride()),
            grad_strides, has_seqlens, causal, scale, with_sums, is_aligned,
        )  # fmt: skip

    shape = grad_out.shape
    known = plan(q, k, v, grad_out, True)
    start = Start(known.plans[0]) if has_near_heads and known.kernel != "two_phase" else None
    of_out = known.kernel == "unrolled"
    batch, _, heads, head_dim = shape
    new_sums = new_tensors(q, (2, batch, heads * head_dim if with_sums else 0), torch.float32)

    def compute(
        grad_out: Tensor, places: Places, out: Tensor, lse: Tensor, seqlens: Tensor | None, of_grads: Places
    ) -> Tensor | None:
        """Write the gradients of attention to ``of_grads``; return the gradient of a bias if ``with_sums``."""
        if start is None:
            q, k, v, grad = _with_near_heads(*places[1](), grad_out.reshape(shape))
            how = plan(q, k, v, grad, _are_aligned(q, k, v, grad))
            return _start_backward(how, q, k, v, grad, out.view(q.shape), lse, seqlens, of_grads[1](), with_sums)
        sums = new_sums()
        at_sums = sums.data_ptr()
        upstream = (out.data_ptr(), grad_out.data_ptr()) if of_out else (grad_out.data_ptr(),)
        at = *places[0], *upstream, lse.data_ptr(), _address(seqlens), *of_grads[0]
        if not start.at(*at, at_sums, at_sums + sums.nbytes // 2):
            tensors = (out, grad_out) if of_out else (grad_out,)
            start(*places[1](), *tensors, lse, seqlens, *of_grads[1](), *sums.unbind(0))
        return grad_of_bias(sums) if with_sums else None

    return compute


def _start_backward(
    how: BackwardPlan, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor,
    seqlens: Tensor | None, grads: tuple[Tensor, Tensor, Tensor], with_sums: bool,
) -> Tensor | None:  # fmt: skip
    """Start the kernels of attention's backward pass, and return the gradient of a bias on the projection."""
    sums = _sums(q, *how.sums, with_sums)
    of_q, of_v = sums[0], sums[1]
    if how.kernel == "unrolled":
        how.plans[0].start(q, k, v, out, grad_out, lse, seqlens, *grads, of_q, of_v)
    elif how.kernel == "short":
        how.plans[0].start(q, k, v, grad_out, lse, seqlens, *grads, of_q, of_v)
    else:
        stats = lse.new_empty((*lse.shape[:2], 2, how.rows))
        of_query, of_key = how.plans
        rest = None
        if how.rest is not None:
            rest = lse.new_empty((*lse.shape[:2], how.rest[0], 2, how.rest[1], q.shape[-1]))
        keys, queries = _tiles(how.tiles[0], k, v), _tiles(how.tiles[1], q, grad_out)
        of_query.start(q, k, v, *keys, out, grad_out, lse, seqlens, stats, grads[0], of_q, rest)
        of_key.start(q, k, v, grad_out, *queries, stats, seqlens, *grads[1:], of_v, rest)
    return grad_of_bias(sums) if with_sums else None


def _sums(q: Tensor, num_q: int, num_k: int, wanted: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Return buffers for the sums of dq and of dv over the rows of each tile; empty unless ``wanted``.

    They are [B, tiles, H * D] each; a single tensor [2, B, H * D] if each sequence is one tile.
    """
    batch, _, heads, head_dim = q.shape
    width = heads * head_dim if wanted else 0
    if num_q == num_k == 1:
        return torch.empty((2, batch, width), dtype=torch.float32, device=q.device)
    dq, dv = (torch.empty((batch, num, width), dtype=torch.float32, device=q.device) for num in (num_q, num_k))
    return dq, dv


def _have_near_heads(*tensors: Tensor) -> bool:
    """Return whether the offset of the last head within an image needs at most 32 bits in all tensors [B, N, H, D]."""
    return all((x.shape[2] - 1) * x.stride(2) < 2**31 for x in tensors)


def _with_near_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors [B, N, H, D], each copied if the offset of its last head within an image needs more than 32 bits.

    The kernels compute this offset in 32 bits: with 64 bits they would take more registers, and a quarter fewer
    programs would run at once.
    """
    return tuple([x if _have_near_heads(x) else x.contiguous() for x in tensors])


def _tiles(rows: int, *sources: Tensor) -> list[TensorDescriptor | None]:
    """Return the descriptors through which an attention kernel loads blocks of ``rows`` rows, two for each source.

    A source has a descriptor for each part of its head dimension (:func:`head_parts`). The second one is None if there
    is one part only, and all are None if ``rows`` is 0.

    Keys with ``seqlens`` have no descriptors: a descriptor would also load the hidden tokens of an image, which may
    hold NaN, and NaN times a probability of zero is NaN.
    """
    if not rows:
        return [None, None] * len(sources)
    parts = head_parts(sources[0].shape[-1])
    found: list[TensorDescriptor | None] = []
    for x in sources:
        found += [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, 1, part]) for part in parts]
        found += [None] * (2 - len(parts))
    return found


def _are_aligned(*tensors: Tensor) -> bool:
    """Return whether attention's tensors begin at multiples of 16 bytes, as tensor descriptors need it."""
    return not any(x.data_ptr() % 16 for x in tensors)
