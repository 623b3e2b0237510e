"""Other implementations of the ops, by the op's name: plain PyTorch, and published packages of others."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from clipfast.kernels import contrastive_loss, reference

from ..case import OURS, AnyFunction, Candidate, Function, Results
from . import peers

SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
FLASH = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}  # the module of each package
LOGIT_SCALE = 1 / 0.07  # the scale in the benchmarks, which is CLIP's at the start of training
PYTHON_SCALE = "its temperature is a number, not learned"
COPYLESS = "10 N^2 D operations, no float32 copy of the text gradients"
IN_A_PASS = "the bias in a pass, where a linear layer adds it in its product"


# These functions compute in the dtype of the case, as a PyTorch model does: they cast float32 parameters, which takes
# very little time, and call PyTorch's own kernels. The references compute in float32.


def _norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Results:
    """Compute the layer norm with the residual addition in plain PyTorch, as a benchmark candidate."""
    s = x if residual is None else x + residual
    y = F.layer_norm(s, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))
    return y if residual is None else (y, s)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute GELU(x + bias) in plain PyTorch, as a benchmark candidate."""
    return F.gelu(x + bias.to(x.dtype))


def _bias_quick_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute QuickGELU(x + bias) in plain PyTorch, as a benchmark candidate."""
    u = x + bias.to(x.dtype)
    return u * torch.sigmoid(1.702 * u)


def _liger_norm() -> AnyFunction:
    """Return Liger's layer norm as a benchmark candidate, after the residual addition in PyTorch."""
    function = peers.need("liger_kernel.ops.layer_norm", "liger-kernel").LigerLayerNormFunction

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Results:
        """Compute Liger's layer norm, a benchmark candidate."""
        s = x if residual is None else x + residual
        y: Tensor = function.apply(s, weight, bias, 1e-5)
        return y if residual is None else (y, s)

    return run


def _attention(options: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """Return benchmark candidates for attention on a packed projection."""
    heads, causal = options["num_heads"], options["causal"]
    return (
        *(Candidate(name, functools.partial(sdpa, backend, heads, causal)) for name, backend in SDPA.items()),
        *(
            Candidate(package, functools.partial(_flash_attn, module, package, heads, causal), needs_gpu=True)
            for package, module in FLASH.items()
        ),
        Candidate("FlexAttention", functools.partial(_flex_attention, heads, causal), needs_gpu=True),
    )


def _projected(qkv: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Return a packed projection, with its bias if there is one, as [batch, tokens, 3, heads, head_dim]."""
    qkv = qkv if bias is None else reference.with_bias_gradient(qkv, bias)
    return qkv.unflatten(-1, (3, heads, -1))


def sdpa(backend: SDPBackend | None, heads: int, causal: bool) -> Function:
    """Return PyTorch's scaled_dot_product_attention by one backend, or by its own choice, as a benchmark candidate."""

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute PyTorch's attention, a benchmark candidate."""
        q, k, v = _projected(qkv, bias, heads).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).flatten(2)

    return run


def _flash_attn(module: str, package: str, heads: int, causal: bool) -> Function:
    """Return the attention of a version of flash-attn as a benchmark candidate."""
    packed = peers.need(module, package).flash_attn_qkvpacked_func

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the attention of flash-attn, a benchmark candidate."""
        out = packed(_projected(qkv, bias, heads), causal=causal)
        # Some releases of flash-attn 3 return the log-sum-exp too.
        return (out[0] if isinstance(out, tuple) else out).flatten(2)

    return run


def _flex_attention(heads: int, causal: bool) -> Function:
    """Return PyTorch's FlexAttention, compiled, as a benchmark candidate."""
    attend = peers.compiled(flex_attention)
    mask_of = functools.cache(lambda tokens, device: create_block_mask(_is_seen, None, None, tokens, tokens, device))

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute PyTorch's FlexAttention, a benchmark candidate."""
        q, k, v = _projected(qkv, bias, heads).permute(2, 0, 3, 1, 4)
        out: Tensor = attend(q, k, v, block_mask=mask_of(qkv.shape[1], qkv.device) if causal else None)
        return out.transpose(1, 2).flatten(2)

    return run


def _is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
    """Return whether a query sees a key under the causal mask, for FlexAttention."""
    return query >= key


_least_memory = functools.partial(contrastive_loss, memory="min")


def _open_clip() -> Function:
    """Return OpenCLIP's contrastive loss as a benchmark candidate."""
    loss = peers.need("open_clip.loss", "open_clip_torch").ClipLoss()
    # A candidate is called with keyword arguments of these names, and the parameters of ClipLoss.forward have others.
    return lambda image, text, logit_scale: loss(image, text, logit_scale)


def _two_sided(one_sided: Function) -> Function:
    """Make a benchmark candidate for the symmetric loss from a cross-entropy of a linear layer."""

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        """Compute the symmetric loss from a benchmark candidate for one side of it."""
        targets = torch.arange(len(image), device=image.device)
        scaled = (logit_scale * image).to(image.dtype), (logit_scale * text).to(text.dtype)
        return (one_sided(scaled[0], text, targets) + one_sided(scaled[1], image, targets)) / 2

    return run


def _memeff() -> Function:
    """Return memeff's memory-efficient contrastive loss as a benchmark candidate."""
    module = peers.need("memeff", "memeff")

    def run(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:  # noqa: ARG001
        """Compute memeff's contrastive loss, a benchmark candidate."""
        # stable=True would scale the gradient by the batch size
        return module.MemoryEfficientCLIPLoss(1 / LOGIT_SCALE, normalized_inputs=True, stable=False)(image, text)

    return run


def _cut_cross_entropy() -> Function:
    """Return the contrastive loss of the package cut-cross-entropy as a benchmark candidate."""
    return _two_sided(peers.need("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy)


def _liger() -> Function:
    """Return the contrastive loss from Liger's fused linear cross-entropy as a benchmark candidate."""
    function = peers.need("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")

    return _two_sided(lambda *args: function.LigerFusedLinearCrossEntropyFunction.apply(*args)[0])


def _open_siglip() -> Function:
    """Return OpenCLIP's sigmoid loss as a benchmark candidate."""
    loss = peers.need("open_clip.loss", "open_clip_torch").SigLipLoss()
    return lambda image, text, logit_scale, logit_bias: loss(image, text, logit_scale, logit_bias)


def _siglip_kernel() -> Function:
    """Return the sigmoid loss of the package siglip-kernel as a benchmark candidate."""
    loss = peers.need("siglip_kernel", "siglip-kernel").fused_siglip_loss
    return lambda image, text, logit_scale, logit_bias: loss(image, text, logit_scale.log(), logit_bias)


# Functions that are measured as "PyTorch" in place of the reference, each with a note for the reader.
PLAIN: dict[str, tuple[AnyFunction, str]] = {
    "layer_norm": (_norm, ""),
    "bias_gelu": (_bias_gelu, IN_A_PASS),
    "bias_quick_gelu": (_bias_quick_gelu, IN_A_PASS),
}
# Functions that return further candidates for an op, given the options of a call.
RIVALS: dict[str, Callable[[Mapping[str, Any]], tuple[Candidate, ...]]] = {
    "attention": _attention,
    "layer_norm": lambda _: (Candidate("Liger", _liger_norm, needs_gpu=True),),
    "contrastive_loss": lambda _: (
        Candidate(f"{OURS}, memory=min", lambda: _least_memory, note=COPYLESS, needs_gpu=True),
        Candidate("OpenCLIP ClipLoss", _open_clip),
        Candidate("OpenCLIP ClipLoss compiled", lambda: peers.compiled(_open_clip())),
        Candidate("memeff", _memeff, lacks=("logit_scale",), note=PYTHON_SCALE, needs_gpu=True),
        Candidate("Cut Cross-Entropy x2", _cut_cross_entropy, needs_gpu=True),
        Candidate("Liger x2", _liger, needs_gpu=True),
    ),
    "sigmoid_loss": lambda _: (
        Candidate("OpenCLIP SigLipLoss", _open_siglip),
        Candidate("siglip-kernel", _siglip_kernel, needs_gpu=True),
    ),
}
