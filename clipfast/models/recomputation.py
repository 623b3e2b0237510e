"""Activation checkpointing of transformer blocks: the backward pass recomputes them, or only norms and activations."""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..kernels import backends

# The ops whose results selective checkpointing keeps; it recomputes all others, which are norms and activations.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.clipfast.attention_fwd.default,
    torch.ops.clipfast.attention_pool_fwd.default,
    torch.ops.clipfast.fp8_linear_fwd.default,
)
_decided = threading.local()  # ``watched``: the result of ``backends.is_watched`` when a block was computed first


def is_watched() -> bool:
    """Return whether a compiler, mode or profiler has to see a block's ops: the result of ``backends.is_watched``.

    While a block is recomputed, this is the result at its first computation, so that both run the same ops.
    """
    watched: bool | None = getattr(_decided, "watched", None)
    return backends.is_watched() if watched is None else watched


def recomputed(recompute: bool | str, function: Callable[..., Tensor], *args: object) -> Tensor:
    """Call a function of a transformer block under activation checkpointing: the backward pass recomputes it.

    With "selective" for ``recompute``, only norms and activations are computed again.
    """
    if recompute != "selective":
        if torch.compiler.is_compiling():
            return checkpoint(function, *args, use_reentrant=False)
        watched = backends.is_watched()

        def decided(*args: object) -> Tensor:
            """Compute a block by the same ops both times, in forward and backward, even if a profiler sees only one."""
            before, _decided.watched = getattr(_decided, "watched", None), watched
            try:
                return function(*args)
            finally:
                _decided.watched = before

        return checkpoint(decided, *args, use_reentrant=False)
    kept = functools.partial(create_selective_checkpoint_contexts, list(_KEPT))
    return checkpoint(function, *args, use_reentrant=False, context_fn=kept)
