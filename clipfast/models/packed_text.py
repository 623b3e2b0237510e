"""Packed texts: a batch without the tokens that no feature of a causal text tower depends on.

Such a tower reads one row of a text, that of its end-of-text token, and no later token changes that row. A packed batch
holds the tokens up to this one only, one text after the other, and the longest text first. Captions of the web
have about 18 of 77 tokens, so that three quarters of the tower's work, and of its memory, are left out. Method: the
packing of language models (Krell et al. 2021), with the cumulative lengths of FlashAttention.

The longest text comes first because a GPU then begins with the tiles that take longest, and because texts of equal
length, which a CPU computes as one batch, lie side by side.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..kernels import backends
from ..kernels.packing import Packing, pack
from .packed import Packed, rounded
from .tokenizer import trim_padding

# Texts are packed if at least this share of a batch is padding: with less, attention over texts of several lengths
# costs more than packing saves. On a GPU, the batch must also have this many tokens, padding included: with fewer, the
# GPU waits for the host anyway, and packing gives the host more to do.
LEAST_PADDING, LEAST_TOKENS = 0.1, 8192
# The dispatch modes in which the results of ops are tensors without values.
_WITHOUT_VALUES = ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedText(Packed):
    """A batch of B texts without the tokens that no feature depends on; :func:`pack_texts` makes it.

    Attributes:
        ids: [T], the token ids of all texts. Ids after the last text have no meaning.
        packing: the bounds of each packed text among the ids.
        order: int64 [B], for each text of the batch its index among the packed texts.
        max_seqlen: no text has more tokens than this.
    """

    ids: Tensor
    packing: Packing
    order: Tensor
    max_seqlen: int

    @property
    def last(self) -> Tensor:
        """int64 [B], the index among all tokens of the last token of each packed text."""
        return self.packing.cu_seqlens[1:].long() - 1

    @property
    def positions(self) -> Tensor:
        """int64 [T], the position of each token in its text; 0 for tokens after the last text."""
        return (torch.arange(len(self.ids), device=self.device) - self.packing.bounds[0]).clamp(min=0)


def pack_texts(texts: Tensor, *, last: Tensor | None = None, for_gpu: bool | None = None) -> PackedText:
    """Pack a batch of texts for a causal text tower that reads one token of each.

    Texts on a GPU are packed there, and the host waits for their lengths. A loop that is not to wait packs texts before
    it copies them: ``pack_texts(texts, for_gpu=True).to(device, non_blocking=True)``.

    Args:
        texts: [B, L] token ids.
        last: int [B], the position in each text of the token that is read; default: that of the largest id, which is
            the end-of-text token in CLIP's vocabulary.
        for_gpu: round the number of tokens up (:func:`.packed.rounded`); default: if the texts are on a GPU.

    Raises:
        TypeError: ``texts`` is not a tensor.
        ValueError: there is no text, or no token, or ``last`` is not a position in each text.
    """
    if not isinstance(texts, Tensor):
        raise TypeError(f"pack_texts: texts must be a tensor of token ids [B, L], got a {type(texts).__name__}")
    if texts.ndim != 2 or texts.numel() == 0:
        raise ValueError(f"pack_texts: texts must be [B, L] with at least one token, got shape {tuple(texts.shape)}")
    lengths = _lengths(texts, last)
    if lengths.shape != texts.shape[:1] or not ((lengths > 0) & (lengths <= texts.shape[1])).all():
        raise ValueError(f"pack_texts: last must be a place in each text of {tuple(texts.shape)}, got {lengths - 1}")
    return _packed(texts, lengths, texts.device.type != "cpu" if for_gpu is None else for_gpu)


def pack_if_shorter(texts: Tensor, last: Tensor | None = None) -> Tensor | PackedText:
    """Return texts packed if that saves enough and the host can read their lengths; otherwise return them unchanged."""
    if not can_be_packed(texts):
        return texts
    lengths = _lengths(texts, last)
    if int(lengths.sum()) > (1 - LEAST_PADDING) * texts.numel():
        return texts
    return _packed(texts, lengths, texts.device.type != "cpu")


def can_be_packed(texts: Tensor) -> bool:
    """Return whether packing texts may save something, and the host can read their lengths.

    The host cannot read lengths under a compiler or a function transform, while a CUDA graph is captured, or if tensors
    have no values.
    """
    least = 1 if texts.device.type == "cpu" else LEAST_TOKENS
    return texts.ndim == 2 and texts.numel() >= least and has_values(texts)


def pack_on_host(texts: Tensor, device: torch.device, *, always: bool = False) -> Tensor | PackedText:
    """Prepare texts on the host for a model on ``device``, so that the model's step does not wait for their lengths.

    They are packed if that saves enough, or ``always``; otherwise the padding that all texts share is cut off.
    """
    is_for_gpu = device.type != "cpu"
    if always or (is_for_gpu and texts.numel() >= LEAST_TOKENS):
        packed = pack_texts(texts, for_gpu=is_for_gpu)
        return packed.pin_memory() if device.type == "cuda" else packed
    trimmed = trim_padding(texts)
    return trimmed if is_for_gpu else pack_if_shorter(trimmed)


_waits = 0  # the number of ``without_waiting`` contexts that are open, in all threads
_lock = threading.Lock()


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Keep models from packing texts that they get as tensors, since packing on a GPU makes the host wait.

    A CUDA graph cannot hold a wait of the host. The calls that warm a graph up must run the same ops as the graph, and
    so must the recomputation of the text tower in the backward pass. Autograd recomputes in a thread of its own, and so
    the context applies to all threads.
    """
    global _waits
    with _lock:
        _waits += 1
    try:
        yield
    finally:
        with _lock:
            _waits -= 1


def has_values(x: Tensor) -> bool:
    """Return whether packing may read the values of a tensor on the host now; see :func:`pack_if_shorter`."""
    if _waits or backends.is_traced() or x.__class__ not in backends.PLAIN or x.is_meta:
        return False
    if any(mode.__class__.__name__ in _WITHOUT_VALUES for mode in _get_current_dispatch_mode_stack()):
        return False
    if x.device.type == "cpu":
        return True
    # On other devices the PyTorch references compute one packed text after another, so packing gains nothing.
    return x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _lengths(texts: Tensor, last: Tensor | None) -> Tensor:
    """Return the number of tokens of each text up to the one that is read, int64 [B] on the CPU."""
    return (texts.argmax(-1) if last is None else last).cpu() + 1


def _packed(texts: Tensor, lengths: Tensor, for_gpu: bool) -> PackedText:
    """Return packed texts with these lengths, which are on the CPU."""
    lengths, packed = lengths.sort(descending=True, stable=True)
    host = lengths.device  # every new tensor gets this device, because torch's default device may be another one
    cu_seqlens = torch.zeros(len(texts) + 1, dtype=torch.int32, device=host)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    used = int(cu_seqlens[-1])
    total = rounded(used, texts.numel()) if for_gpu else used
    place = torch.zeros(total, dtype=torch.int64, device=host)  # the index of each packed token in texts.flatten()
    starts = packed * texts.shape[1] - cu_seqlens[:-1]
    torch.add(starts.repeat_interleave(lengths), torch.arange(used, device=host), out=place[:used])
    found = PackedText(place, pack(cu_seqlens, total), packed.argsort(), texts.shape[1])
    found = found if texts.device.type == "cpu" else found.to(texts.device)
    return dataclasses.replace(found, ids=texts.flatten().index_select(0, found.ids))
