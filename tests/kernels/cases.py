"""Inputs of the kernel tests: each size says why it is there."""

import functools
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import (
    attention,
    attention_pool,
    attention_qkv,
    bias_gelu,
    bias_quick_gelu,
    contrastive_loss,
    info_nce_loss,
    layer_norm,
    layer_norm_pair,
    nt_xent_loss,
    patch_embed,
    sigmoid_loss,
    text_embed,
)

# (batch, tokens, heads, head_dim, causal)
ATTENTION_SHAPES = [
    (1, 1, 1, 64, False),  # one token: softmax of one
    (2, 50, 2, 64, False),  # ViT-B/32
    (2, 77, 2, 64, True),  # the text tower; crosses a tile under the causal mask
    (1, 197, 1, 64, False),  # ViT-B/16
    (1, 64, 2, 32, True),  # exactly one tile; the small model's head_dim
    (1, 65, 1, 80, False),  # H/14's head_dim, padded to 128; one token past a tile
    (1, 33, 1, 104, True),  # bigG/14's head_dim
    (3, 7, 1, 8, True),  # less than any tile in both directions
]
# one below, at and above every width at which something changes, and CLIP's own
ATTENTION_LENGTHS = (1, 15, 16, 17, 49, 50, 63, 64, 65, 77, 145, 196, 197, 255, 256, 257, 272, 273, 577, 730)
ATTENTION_HEAD_DIMS = (8, 64, 80, 88, 104)
ATTENTION_SIZES = [(n, d) for n in ATTENTION_LENGTHS for d in ATTENTION_HEAD_DIMS]
# (batch, height, width, patch, embed_dim)
PATCH_SHAPES = [
    (1, 8, 8, 8, 16),  # one patch
    (2, 28, 28, 14, 40),  # patch 14: 588 pixels, which no tile divides
    (3, 32, 48, 16, 72),  # not square; embed_dim past a tile
    (5, 64, 32, 32, 24),  # patch 32
    (2, 21, 35, 7, 40),  # patch 7: rows of 7 pixels, which no vector load divides; 3 x 5 patches
]


def loss_inputs(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, *, matched: float, scale: float
) -> dict[str, Tensor]:
    """Unit features whose pairs are alike to the degree ``matched``: 0 is the start of training, 1 its end."""
    image = F.normalize(torch.randn(shape), dim=-1)
    text = F.normalize(matched * image + (1.001 - matched) * F.normalize(torch.randn(shape), dim=-1), dim=-1)
    return {
        "image": image.to(device, dtype),
        "text": text.to(device, dtype),
        "logit_scale": torch.tensor(scale, device=device),
    }


def rank_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Features of small integers, whose products are exact in any order, and an image or none (-1) for each text."""
    images, texts, width = shape
    image, text = (torch.randint(-2, 3, (rows, width)).to(device, dtype) for rows in (images, texts))
    return {"image": image, "text": text, "text_image": torch.randint(-1, images, (texts,)).to(device)}


def attention_inputs(
    shape: tuple[int, int, int, int, bool], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """A packed projection, and a gradient of the output."""
    batch, tokens, heads, head_dim, _ = shape
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim).to(device, dtype)
    return {"qkv": qkv}, torch.randn(batch, tokens, heads * head_dim).to(device, dtype)


def patch_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    uint8: bool,
    keep: int | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Images and parameters, and a gradient of the tokens; with ``keep``, of so many patches an image in any order."""
    batch, height, width, patch, embed_dim = shape
    num_patches = (height // patch) * (width // patch)
    images = (
        torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        if uint8
        else torch.randn(batch, 3, height, width).to(dtype)
    )
    inputs = {
        "images": images.to(device),
        "weight": (torch.randn(embed_dim, 3, patch, patch) / patch).to(device, dtype),
        "class_embedding": torch.randn(embed_dim).to(device, dtype),
        "positional_embedding": torch.randn(1 + num_patches, embed_dim).to(device, dtype),
    }
    if keep is not None:
        inputs["keep"] = torch.rand(batch, num_patches).argsort(1)[:, :keep].to(device)
    tokens = 1 + (num_patches if keep is None else keep)
    return inputs, torch.randn(batch, tokens, embed_dim).to(device, dtype)


def norm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, residual: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Rows away from zero, the parameters of a layer norm in float32, and a gradient of the output."""
    x = (torch.randn(shape) + 0.5).to(device, dtype)
    weight, bias = (torch.randn(shape[-1]).to(device, torch.promote_types(dtype, torch.float32)) for _ in range(2))
    inputs = {"x": x, "weight": weight, "bias": bias}
    if residual:
        inputs["residual"] = torch.randn(shape).to(device, dtype)
    return inputs, torch.randn(shape).to(device, dtype)


def text_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, spare: int = 2
) -> tuple[dict[str, Tensor], Tensor]:
    """Ids [batch, length] of a table [vocab, width], positions of which ``spare`` are not used, and a gradient."""
    batch, length, vocab, width = shape
    inputs = {
        "text": torch.randint(0, vocab, (batch, length)).to(device),
        "token_embedding": torch.randn(vocab, width).to(device, dtype),
        "positional_embedding": torch.randn(length + spare, width).to(device, dtype),
    }
    return inputs, torch.randn(batch, length, width).to(device, dtype)


def both(inputs: dict[str, Tensor], norm: Callable[..., tuple[Tensor, Tensor]] = layer_norm) -> Tensor:
    """Both results of a layer norm with a residual, or of a pair of them, side by side."""
    return torch.cat(norm(**inputs), -1)


def pair_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a pair of layer norms, and a gradient of its two results side by side."""
    first, grad_s = norm_inputs(shape, dtype, device, residual=False)
    second, grad_y = norm_inputs(shape, dtype, device, residual=False)
    parameters = {f"{name}_{i}": x[name] for i, x in ((1, first), (2, second)) for name in ("weight", "bias")}
    return {"x": first["x"], **parameters}, torch.cat([grad_s, grad_y], -1)


def small_calls(
    dtype: torch.dtype, device: torch.device, scale: int = 1
) -> dict[str, tuple[Callable[..., Tensor], dict[str, Tensor], Tensor]]:
    """Each op at a small size, its batch times ``scale``: (function, inputs, gradient)."""
    attn, attn_grad = attention_inputs((2 * scale, 9, 2, 8, True), dtype, device)
    separate = {"q": torch.randn(2 * scale, 5, 3, 8), "k": torch.randn(2 * scale, 9, 3, 8)}
    separate = {name: x.to(device, dtype) for name, x in (separate | {"v": torch.randn(2 * scale, 9, 3, 8)}).items()}
    pool = {"query": torch.randn(2 * scale, 3, 10), "tokens": torch.randn(2 * scale, 7, 10)}
    pool = {name: x.to(device, dtype) for name, x in pool.items()}
    patch, patch_grad = patch_inputs((2 * scale, 8, 12, 4, 10), dtype, device, uint8=False)
    byte, _ = patch_inputs((2 * scale, 8, 12, 4, 10), dtype, device, uint8=True)
    kept, kept_grad = patch_inputs((2 * scale, 8, 12, 4, 10), dtype, device, uint8=False, keep=4)
    norm, norm_grad = norm_inputs((2 * scale, 5, 12), dtype, device, residual=True)
    alone = {name: norm[name] for name in ("x", "weight", "bias")}
    pair, pair_grad = pair_inputs((2 * scale, 5, 12), dtype, device)
    act = {"x": norm["x"], "bias": norm["bias"]}
    text_ids, text_grad = text_inputs((2 * scale, 5, 7, 12), dtype, device)
    loss = loss_inputs((11 * scale, 6), dtype, device, matched=0.3, scale=5.0)
    image, text, logit_scale = loss.values()
    queue = loss_inputs((7 * scale, 6), dtype, device, matched=0.3, scale=5.0)["image"]
    queued = {"query": image, "key": text, "negatives": queue, "logit_scale": logit_scale}
    views = {"first": image, "second": text, "logit_scale": logit_scale}
    biased = loss | {"logit_bias": torch.tensor(-3.0, device=device)}
    return {
        "contrastive_loss": (contrastive_loss, loss, torch.tensor(1.0)),
        "info_nce_loss": (info_nce_loss, queued, torch.tensor(1.0)),
        "nt_xent_loss": (nt_xent_loss, views, torch.tensor(1.0)),
        "sigmoid_loss": (sigmoid_loss, biased, torch.tensor(1.0)),
        "attention": (functools.partial(attention, num_heads=2, causal=True), attn, attn_grad),
        "attention_qkv": (attention_qkv, separate, torch.randn(2 * scale, 5, 3, 8).to(device, dtype)),
        "attention_pool": (attention_pool, pool, torch.randn(2 * scale, 3, 10).to(device, dtype)),
        "attention_pool of lengths": (
            attention_pool,
            pool | {"seqlens": torch.arange(2 * scale, dtype=torch.int32, device=device) % 7 + 1},
            torch.randn(2 * scale, 3, 10).to(device, dtype),
        ),
        "layer_norm": (layer_norm, alone, norm_grad),
        "layer_norm of a sum": (lambda **inputs: both(inputs), norm, torch.cat([norm_grad, norm_grad], -1)),
        "layer_norm_pair": (lambda **inputs: both(inputs, layer_norm_pair), pair, pair_grad),
        "bias_gelu": (bias_gelu, act, norm_grad),
        "bias_quick_gelu": (bias_quick_gelu, act, norm_grad),
        "patch_embed": (patch_embed, patch, patch_grad),
        "patch_embed of bytes": (patch_embed, byte, patch_grad),
        "text_embed": (text_embed, text_ids, text_grad),
        "patch_embed of kept patches": (patch_embed, kept, kept_grad),
    }


def strided(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "offset":
        # One element past an aligned address: vector loads would fault.
        flat = x.new_zeros(x.numel() + 1)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x


def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the bytes of each load and store that the interpreter does."""
    moved: list[int] = []
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def counting(name: str, mask_at: int) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)

        def run(self, ptrs, *args):
            moved.append(int(args[mask_at].data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8)
            return original(self, ptrs, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, run)

    counting("create_masked_load", 0)
    counting("create_masked_store", 1)
    return moved


def huge_strides(shape: tuple[int, ...]) -> Tensor:
    """A float16 tensor whose last axis strides over more than 2^31 elements; only the pages that are touched exist."""
    stride = 2**31 // (shape[-1] - 1) + 16
    inner = torch.empty(shape[:-1]).stride()
    # not torch.empty, whose memory the tests fill
    return torch.empty_strided(shape, (*inner, stride), dtype=torch.float16)
