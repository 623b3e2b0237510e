"""Predicted times of other people's kernels and ours on an H100 at CLIP's sizes, forward and backward.

The kernels are launched by their own wrappers, in 16 bits. The PyTorch kernels that a wrapper calls count with their
bytes or their FLOPs, whichever takes longer, as for our ops.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from clipfast.io.text import align
from clipfast.io.units import SECONDS, scaled
from clipfast.kernels.spec import lengths_of
from clipfast.verify.stand_in import stand_in_gpu

from ...case import short
from ..forecast import forecast, measured_shapes
from ..model import H100, NoModel
from . import flex
from .figures import time_of
from .kernels import Work, configured, half, of
from .recording import recording
from .sources import Missing, module, package

BF16 = torch.bfloat16


def loss_by_memeff(folder: Path, pairs: int, width: int) -> list[Work]:
    """Launch memeff's contrastive loss of unit features."""
    with package(folder, "memeff", "0.3.1") as imported:
        loss = imported("memeff").MemoryEfficientCLIPLoss(normalized_inputs=True)
        image, text = (half(pairs, width, dtype=BF16, grad=True) for _ in range(2))
        with recording() as found:
            loss(image, text).backward()
    return [of(found)]


def sigmoid_by_siglip_kernel(folder: Path, pairs: int, width: int) -> list[Work]:
    """Launch siglip-kernel's loss in the variant that it takes for 16 bits."""
    with package(folder, "siglip-kernel", "0.1.2") as imported:
        with stand_in_gpu():  # the module asks for the GPU when it is imported
            loss = imported("siglip_kernel").fused_siglip_loss
        image, text = (half(pairs, width, dtype=BF16, grad=True) for _ in range(2))
        scale, bias = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        with recording() as found:
            loss(image, text, scale, bias).backward()
    return [of(found)]


def attention_by_tutorial(
    folder: Path, batch: int, heads: int, tokens: int, causal: bool, varlen: bool
) -> list[Work]:  # fmt: skip
    """Launch the attention of Triton's tutorial, on tokens that are padded to a multiple of 128, which it needs."""
    if varlen:
        raise NoModel("it takes no packed sequences")
    tutorial = module(folder, "attention with descriptors")
    tensors = [half(batch, heads, -(-tokens // 128) * 128, 64, grad=True) for _ in range(3)]
    works = []
    for block_m, block_n, warps in ((128, 64, 4), (64, 64, 4)):
        wanted = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 3}
        with configured(tutorial._attn_fwd, **wanted), recording() as found:
            out = tutorial.attention(*tensors, causal, 0.125, False)
            torch.autograd.backward(out, torch.empty_like(out))
        works.append(of(found))
    return works


def attention_by_inductor(
    _: Path, batch: int, heads: int, tokens: int, causal: bool, varlen: bool
) -> list[Work]:  # fmt: skip
    """Launch FlexAttention's kernels; of causal ones, only those of packed sequences, with their mask, are built."""
    if causal != varlen:
        raise NoModel("FlexAttention is built without a mask, and with the causal one of packed sequences")
    mask, shape = None, (batch, tokens, heads, 64)
    if varlen:
        lengths = lengths_of(batch, tokens)
        mask, shape = flex.mask_of_sequences(lengths), (1, sum(lengths), heads, 64)
    query, key, value = (half(*shape, dtype=BF16).transpose(1, 2) for _ in range(3))
    with recording() as found:
        flex.forward(query, key, value, mask=mask)
        flex.backward(query, key, value, mask=mask)
        torch.mul(query, query)  # the row sums of output times gradient
    return [of(found)]


def attention_by_fla(folder: Path, batch: int, heads: int, tokens: int, causal: bool, varlen: bool) -> list[Work]:
    """Launch the softmax attention of flash-linear-attention, which is causal and takes packed sequences."""
    if not causal:
        raise NoModel("it has no attention without the causal mask")
    with package(folder, "fla-core", "0.6.0") as imported:
        with stand_in_gpu():
            attend = imported("fla.ops.attn.parallel").parallel_attn
        shape, options = (batch, tokens, heads, 64), {}
        if varlen:
            lengths = [length for length in lengths_of(batch, tokens) if length]
            shape = (1, sum(lengths), heads, 64)
            options["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(lengths)])
        tensors = [half(*shape, dtype=BF16, grad=True) for _ in range(3)]
        for _ in range(2):  # the first call computes where the sequences lie, and fla keeps this for the second
            with recording() as found:
                out = attend(*tensors, **options)
                torch.autograd.backward(out, torch.empty_like(out))
    return [of(found)]


# For each op, the sizes that the calls of other people's kernels take, and these calls by name.
Peer = Callable[..., list[Work]]
PEERS: dict[str, tuple[tuple[str, ...], dict[str, Peer]]] = {
    "contrastive_loss": (("pairs", "embed_dim"), {"memeff": loss_by_memeff}),
    "sigmoid_loss": (("pairs", "embed_dim"), {"siglip-kernel": sigmoid_by_siglip_kernel}),
    "attention": (
        ("batch", "heads", "tokens", "causal", "varlen"),
        {"Triton tutorial": attention_by_tutorial, "FlexAttention": attention_by_inductor, "fla": attention_by_fla},
    ),
}


def compare(folder: Path, wanted: Callable[[str], object]) -> Iterator[str]:
    """Yield a row for each peer in the cases whose name is ``wanted``: its time and ours, or the reason for no time."""
    for number, (spec, shape) in enumerate(measured_shapes()):
        sizes = shape.to_dict()
        names, peers = PEERS.get(spec.name, ((), {}))
        case = " ".join([spec.name, *(f"{name}={sizes[name]}" for name in names if name in sizes)])
        if not peers or not wanted(case) or sizes.get("head_dim", 64) != 64:
            continue
        ours = forecast(number, "bf16").seconds
        for peer, call in peers.items():
            try:
                theirs = _fastest(call(folder, *(sizes.get(name, False) for name in names)))
                cells = [scaled(theirs, SECONDS), f"{theirs / ours:.2f}x"]
            except Exception as error:  # an error of upstream code must not end the loop over the other peers
                cells = [str(error) if isinstance(error, Missing | NoModel) else short(error)]
            row = [case, "clipfast", scaled(ours, SECONDS), peer, *cells]
            yield align([row], right=(2, 4, 5), at_least=(69, 8, 8, 15, 8, 6))


def _fastest(works: Sequence[Work]) -> float:
    """Return the time of the fastest way to run a peer; raise :class:`NoModel` if the model covers none."""
    found = []
    for work in works:
        try:
            found.append(time_of(work, H100)[0])
        except NoModel:
            if not found and work is works[-1]:
                raise
    return min(found)
