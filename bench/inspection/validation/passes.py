"""Losses, attention and norms for the validation, called as their own projects call them.

See :mod:`.kernels` for the arguments and results of the functions.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor  # Liger uses this module without importing it
from triton.tools.tensor_descriptor import TensorDescriptor

from . import flex
from .kernels import HALF, Work, configured, half, of
from .recording import Recorded, recording
from .sources import module, package

BF16, FP32 = torch.bfloat16, torch.float32


def linear_cross_entropy(folder: Path, tokens: int, width: int, vocabulary: int) -> list[Work]:
    """Launch verl's forward pass: product and online softmax over the vocabulary, without storing the logits."""
    kernels = module(folder, "linear cross-entropy")
    hidden, weight = half(tokens, width, dtype=BF16), half(vocabulary, width, dtype=BF16)
    with recording() as found:
        kernels.efficient_entropy_forward(hidden, weight, torch.zeros(tokens, dtype=torch.int64), 0, 1.0, None)
    products, statistics = found.launches[0], found.launches[1:]
    moved = hidden.nbytes + weight.nbytes + 3 * tokens * math.ceil(vocabulary / 1024) * 4
    launches = ((products, moved), *((one, None) for one in statistics))
    return [Work(launches, tuple(found.others), 2.0 * tokens * width * vocabulary)]


def linear_cross_entropy_backward(folder: Path, tokens: int, width: int, vocabulary: int) -> list[Work]:
    """Launch verl's backward pass, which computes the gradient of the logits in parts of 9,504 columns.

    cuBLAS multiplies each part by the weight and by the hidden states. All parts but the last are equally large.
    """
    kernels = module(folder, "linear cross-entropy")
    hidden, weight = half(tokens, width, dtype=BF16), half(vocabulary, width, dtype=BF16)
    rows = [torch.empty(tokens) for _ in range(5)]
    with recording() as found:
        kernels.efficient_entropy_backward(
            rows[0], rows[1], hidden, weight, torch.zeros(tokens, dtype=torch.int64), *rows[2:], 0, False, 1.0, None
        )
    part = hidden.nbytes + (width + tokens) * 9504 * HALF
    launches = tuple((found.launches[0], part) for _ in found.launches)
    return [Work(launches, tuple(found.others), 6.0 * tokens * width * vocabulary)]


def bytes_to_float(folder: Path, source: str, target: str, size: int) -> list[Work]:
    """Launch triton_kernels' pass that turns a square matrix of bytes into floats, as its wrapper launches it."""
    kernel = module(folder, "bytes")._upcast_from_mxfp
    packed = 2 if source == "e2m1" else 1
    dtypes = {"e2m1": torch.uint8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    taken = torch.empty(size, size // packed, dtype=dtypes[source])
    scale = torch.empty(size, size // 32, dtype=torch.uint8)
    made = torch.empty(size, size, dtype=getattr(torch, target))
    with recording() as found:
        to = TensorDescriptor.from_tensor(made, [64, 128])
        come = TensorDescriptor.from_tensor(taken, [64, 128 // packed])
        kernel[size // 64, size // 128](to, come, scale, *scale.stride(), size, size, 64, 128, 32, num_warps=4)
    return [of(found, moved=float(taken.nbytes + scale.nbytes + made.nbytes))]


def parallel_cross_entropy(folder: Path, vocabulary: int) -> list[Work]:
    """Launch Liger's vocabulary-parallel cross-entropy on one GPU, forward, to validate its predicted time."""
    with package(folder, "liger-kernel", "0.8.1") as imported:
        Loss = imported("liger_kernel.ops.vocab_parallel_cross_entropy").LigerVocabParallelCEFunction
        logits = half(2048, 4, vocabulary, dtype=BF16)
        with recording() as found:
            Loss.apply(logits, torch.zeros(2048, 4, dtype=torch.int64), None, -100, 0.0, "megatron", "partition")
    return [of(found)]


def total_variation(folder: Path, vocabulary: int) -> list[Work]:
    """Launch Liger's total variation distance and its gradient, one pass, to validate its predicted time."""
    with package(folder, "liger-kernel", "0.8.0") as imported:
        Loss = imported("liger_kernel.ops.tvd").LigerTVDLossFunction
        shape = (8 * 2048, vocabulary)
        with recording() as found:
            Loss.apply(torch.empty(shape), torch.empty(shape))
    return [of(found)]


def sigmoid_pass(folder: Path, pairs: int) -> list[Work]:
    """Launch siglip-kernel's pass once for each chunk of logits, to validate its predicted time."""
    chunk = 4096
    with package(folder, "siglip-kernel", "0.1.2") as imported:
        one = torch.tensor(1.0)
        with recording() as found:
            imported("siglip_kernel.triton_sigmoid_bce").sigmoid_bce_forward(
                half(chunk, pairs, dtype=BF16), 0, pairs, True, one, one
            )
    moved = 2.0 * chunk * pairs * HALF
    return [Work(((found.launches[0], moved),) * (pairs // chunk))]


def attention(folder: Path, batch: int, heads: int, length: int, dim: int, descriptors: bool) -> list[Work]:
    """Launch the Triton tutorial's forward pass in the tiles among which its autotuner chooses."""
    tutorial = module(folder, "attention with descriptors" if descriptors else "attention")
    tensors = [half(batch, heads, length, dim) for _ in range(3)]
    flops, moved = 4.0 * batch * heads * length**2 * dim, 4 * tensors[0].nbytes
    tiles = [(128, 64, 4), (64, 64, 4), *([(128, 128, 8)] if descriptors and dim == 128 else [])]
    more = (False,) if descriptors else ()
    works = []
    for block_m, block_n, warps in tiles:
        wanted = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 3}
        with configured(tutorial._attn_fwd, **wanted), recording() as found:
            tutorial.attention(*tensors, False, 0.5, *more)
        works.append(of(found, flops, moved=moved, variant=f"{block_m}x{block_n} w{warps}"))
    return works


def _flex_tensors(length: int) -> list[torch.Tensor]:
    """Return uninitialised queries, keys and values for FlexAttention."""
    return [half(1, length, heads, 128, dtype=BF16).transpose(1, 2) for heads in (64, 8, 8)]


def flex_forward(folder: Path, length: int, causal: bool) -> list[Work]:  # noqa: ARG001  (it comes with PyTorch)
    """Launch FlexAttention's forward pass: 64 query heads that share 8 key heads, dimension 128."""
    with recording() as found:
        flex.forward(*_flex_tensors(length), mask=flex.causal_mask(length) if causal else None)
    return [of(found, 4.0 * length**2 * 64 * 128 / (1 + causal))]


def flex_backward(folder: Path, length: int, causal: bool) -> list[Work]:  # noqa: ARG001  (it comes with PyTorch)
    """Launch FlexAttention's backward pass, with the kernel for the row sums of output times gradient."""
    tensors = _flex_tensors(length)
    with recording() as found:
        flex.backward(*tensors, mask=flex.causal_mask(length) if causal else None)
        torch.mul(tensors[0], tensors[0])
    return [of(found, 10.0 * length**2 * 64 * 128 / (1 + causal))]


def separate_backward(folder: Path, length: int) -> list[Work]:
    """Launch the backward pass of a causal attention in three kernels: 64 query heads that share 4 key heads of 128."""
    attend = module(folder, "attention in separate kernels").triton_fa2
    found = _grouped_backward(attend, length, length)
    return [of(found, 5.0 * length**2 * 64 * 128)]


def compressed_backward(folder: Path, length: int) -> list[Work]:
    """Launch the backward pass of an attention to every sixteenth key, in the same heads as the one above."""
    attend = module(folder, "compressed attention").compress_attn
    return [of(_grouped_backward(attend, length, (length - 32) // 16 + 1, 32, 16))]


def _grouped_backward(attend: Any, queries: int, keys: int, *more: int) -> Recorded:
    """Record the backward pass of ``attend`` for tensors [1, length, heads, 128]."""
    tensors = [half(1, queries, 64, 128, dtype=BF16, grad=True)]
    tensors += [half(1, keys, 4, 128, dtype=BF16, grad=True) for _ in range(2)]
    with recording():
        out, _ = attend(*tensors, *more)
    with recording() as found:
        out.backward(torch.empty_like(out))
    return found


def _forward_and_backward(apply: Any, tensors: Iterable[torch.Tensor], *more: Any) -> tuple[Recorded, Recorded]:
    """Record the forward and the backward pass of an autograd function separately."""
    with recording() as forward:
        result = apply(*tensors, *more)
    results = [one for one in (result if isinstance(result, tuple) else (result,)) if one.requires_grad]
    with recording() as backward:
        torch.autograd.backward(results, [torch.empty_like(one) for one in results])
    return forward, backward


def layer_norm(folder: Path, rows: int, width: int, backward: bool) -> list[Work]:
    """Launch Liger's LayerNorm in float32, to validate its predicted time."""
    with package(folder, "liger-kernel", "0.6.0") as imported:
        Norm = imported("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        tensors = [torch.empty(shape, requires_grad=True) for shape in ((rows, width), (width,), (width,))]
        found = _forward_and_backward(Norm.apply, tensors, 1e-6)
    return [of(found[backward])]


def megatron_rms_norm(folder: Path, rows: int, width: int, both: bool) -> list[Work]:
    """Launch Liger's RMSNorm in bfloat16: the forward pass, or with ``both`` also a sum and the backward pass."""
    with package(folder, "liger-kernel", "0.8.0") as imported:
        Norm = imported("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        tensors = [half(rows, 1, width, dtype=BF16, grad=True), half(width, dtype=BF16, grad=True)]
        with recording() as found:
            result = Norm.apply(*tensors, 1e-6, 0.0, "llama", True, None)
            if both:
                result.sum().backward()
    return [of(found)]


def add_rms_norm(folder: Path, rows: int, width: int, backward: bool) -> list[Work]:
    """Launch Liger's RMSNorm of a sum, which it returns too, in float32, to validate its predicted time."""
    with package(folder, "liger-kernel", "0.8.0") as imported:
        Norm = imported("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
        shapes = ((1, rows, width), (1, rows, width), (width,))
        tensors = [torch.empty(shape, dtype=FP32, requires_grad=True) for shape in shapes]
        found = _forward_and_backward(Norm.apply, tensors, 1e-6, 0.0, "llama", False)
    return [of(found[backward])]


def relu_squared(folder: Path, rows: int, width: int, backward: bool) -> list[Work]:
    """Launch Liger's squared ReLU in bfloat16, to validate its predicted time."""
    with package(folder, "liger-kernel", "0.8.0") as imported:
        Activation = imported("liger_kernel.ops.relu_squared").LigerReLUSquaredFunction
        found = _forward_and_backward(Activation.apply, [half(rows, width, dtype=BF16, grad=True)])
    return [of(found[backward])]
