"""Every kernel at the shapes of the published models: what the offline compiler compiles."""

from collections.abc import Callable

import torch

from clipfast.kernels import (
    attention,
    attention_pool,
    bias_gelu,
    bias_quick_gelu,
    contrastive_loss,
    layer_norm,
    layer_norm_pair,
    patch_embed,
    retrieval_ranks,
    sigmoid_loss,
    text_embed,
)
from clipfast.kernels.hardware import ARCHITECTURES

Case = Callable[[], object]

# No tile of these has the 64 rows that the matrix units of sm_90 and sm_100 want.
_SMALL_TILES = ("attention N17 D32 bf16", "attention_pool")


def known_problems(version: str, arch: int, case: str) -> tuple[str, ...]:
    """The problems that a case may have under a Triton version ("3.9") and that clipfast cannot help."""
    unit = ARCHITECTURES[arch].matrix_unit
    if case.startswith(_SMALL_TILES) and case.endswith("bf16"):
        return small_tile_problems(arch)
    # Triton 3.6 takes bytes widened to float32 for a type that tf32 holds, and uses it though asked for full precision
    if (version, arch) == ("3.6", 100) and case.endswith("bytes fp32"):
        return (f"multiplies with {unit}, expected none",)
    return ()


def small_tile_problems(arch: int) -> tuple[str, ...]:
    """The problems of a kernel whose tiles have fewer rows than the matrix units of ``arch`` want."""
    unit = ARCHITECTURES[arch].matrix_unit
    kinds = ("mma.sync", f"mma.sync+{unit}") if arch >= 90 else ()
    return tuple(f"multiplies with {found}, expected {unit}" for found in kinds)


def shipped_cases() -> dict[str, Case]:
    """Forward and backward calls by name, ``<op> <shape> <dtype>``; values are never read, so the tensors are empty."""
    cases: dict[str, Case] = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        cases[f"contrastive N1024 D512 {name}"] = _contrastive(dtype, 1024)
        cases[f"sigmoid N1024 D512 {name}"] = _sigmoid(dtype, 1024)
        cases[f"retrieval_ranks M1024 N5120 D512 {name}"] = _retrieval_ranks(dtype, 1024, 5120)
        # 64: all texts, B and L; 80: H/14; 88: g/14; 104: bigG/14; 32: the small model
        for tokens, head_dim in ((257, 64), (257, 80), (257, 88), (257, 104), (17, 32)):
            cases[f"attention N{tokens} D{head_dim} {name}"] = _attention(dtype, tokens, head_dim)
        cases[f"attention N77 D64 causal {name}"] = _attention(dtype, 77, 64, causal=True)
        cases[f"attention_pool H32 N50 C2048 {name}"] = _attention_pool(dtype, 32, 50, 2048)
        for patch in (14, 16, 32):
            cases[f"patch_embed P{patch} bytes {name}"] = _patch_embed(dtype, patch, torch.uint8)
        cases[f"patch_embed P16 floats {name}"] = _patch_embed(dtype, 16, dtype)
    # B/32, B/16, and L/14 at 336 pixels, which only 16 bits treat in another way
    for tokens in (50, 197, 577):
        cases[f"attention N{tokens} D64 bf16"] = _attention(torch.bfloat16, tokens, 64)
    # the last blocks of B's texts, of bigG, and of L/14 at 336 pixels
    cases["attention_pool H8 N77 C512 lengths bf16"] = _attention_pool(torch.bfloat16, 8, 77, 512, lengths=True)
    cases["attention_pool H16 N257 C1664 bf16"] = _attention_pool(torch.bfloat16, 16, 257, 1664)
    cases["attention_pool H16 N577 C1024 bf16"] = _attention_pool(torch.bfloat16, 16, 577, 1024)
    # B, L, H and bigG, and their MLPs; the widest of all
    for width in (768, 1024, 1280, 1664, 4096, 8192):
        cases[f"layer_norm residual N{width} bf16"] = _layer_norm(torch.bfloat16, width)
        cases[f"layer_norm_pair N{width} bf16"] = _layer_norm_pair(torch.bfloat16, width)
    for width in (1024, 4096, 8192):
        cases[f"layer_norm_pair N{width} fp32"] = _layer_norm_pair(torch.float32, width)
    cases["layer_norm residual N1024 fp32"] = _layer_norm(torch.float32, 1024)
    cases["layer_norm residual N8192 fp32"] = _layer_norm(torch.float32, 8192)
    cases["layer_norm residual N1024 bf16 into fp32"] = _layer_norm(torch.float32, 1024, torch.bfloat16)
    for width in (4096, 5120):
        cases[f"bias_gelu N{width} bf16"] = _bias_act(bias_gelu, torch.bfloat16, width)
    cases["bias_gelu N4096 fp32"] = _bias_act(bias_gelu, torch.float32, 4096)
    cases["bias_quick_gelu N4096 bf16"] = _bias_act(bias_quick_gelu, torch.bfloat16, 4096)
    # B, L and bigG; a table in float32 under autocast, as in training
    for width in (512, 768, 1280):
        cases[f"text_embed fp32 table N{width} bf16"] = _text_embed(torch.float32, width, autocast=True)
    cases["text_embed N768 bf16"] = _text_embed(torch.bfloat16, 768)
    cases["text_embed N512 fp32"] = _text_embed(torch.float32, 512)
    # a last batch of any size: nothing is aligned
    cases["contrastive N1001 D512 bf16"] = _contrastive(torch.bfloat16, 1001)
    cases["sigmoid N1001 D512 bf16"] = _sigmoid(torch.bfloat16, 1001)
    cases["retrieval_ranks M1001 N5005 D512 bf16"] = _retrieval_ranks(torch.bfloat16, 1001, 5005)
    # 16 bits like bf16, but with scales of its own
    cases["contrastive N1024 D512 fp16"] = _contrastive(torch.float16, 1024)
    cases["sigmoid N1024 D512 fp16"] = _sigmoid(torch.float16, 1024)
    cases["retrieval_ranks M1024 N5120 D512 fp16"] = _retrieval_ranks(torch.float16, 1024, 5120)
    cases["attention N77 D64 causal fp16"] = _attention(torch.float16, 77, 64, causal=True)
    cases["patch_embed P16 bytes fp16"] = _patch_embed(torch.float16, 16, torch.uint8)
    # half of the patches are dropped
    cases["patch_embed P16 bytes keep98 bf16"] = _patch_embed(torch.bfloat16, 16, torch.uint8, keep=98)
    cases["patch_embed P16 floats keep98 bf16"] = _patch_embed(torch.bfloat16, 16, torch.bfloat16, keep=98)
    cases["patch_embed P16 floats keep98 fp32"] = _patch_embed(torch.float32, 16, torch.float32, keep=98)
    return cases


def _contrastive(dtype: torch.dtype, pairs: int) -> Case:
    def run() -> None:
        image, text = (torch.empty(pairs, 512, dtype=dtype, requires_grad=True) for _ in range(2))
        contrastive_loss(image, text, 10.0).backward()

    return run


def _sigmoid(dtype: torch.dtype, pairs: int) -> Case:
    def run() -> None:
        image, text = (torch.empty(pairs, 512, dtype=dtype, requires_grad=True) for _ in range(2))
        sigmoid_loss(image, text, 10.0, -10.0).backward()

    return run


def _retrieval_ranks(dtype: torch.dtype, images: int, texts: int) -> Case:
    def run() -> None:
        image, text = (torch.empty(rows, 512, dtype=dtype) for rows in (images, texts))
        retrieval_ranks(image, text, text_image=torch.zeros(texts, dtype=torch.int64))

    return run


def _attention(dtype: torch.dtype, tokens: int, head_dim: int, *, causal: bool = False) -> Case:
    def run() -> None:
        heads = 16
        qkv = torch.empty(2, tokens, 3 * heads * head_dim, dtype=dtype, requires_grad=True)
        bias = torch.empty(qkv.shape[-1], requires_grad=True)
        attention(qkv, heads, causal=causal, bias=bias).backward(torch.empty(2, tokens, heads * head_dim, dtype=dtype))

    return run


def _attention_pool(dtype: torch.dtype, heads: int, tokens: int, width: int, *, lengths: bool = False) -> Case:
    def run() -> None:
        query, x = (torch.empty(2, rows, width, dtype=dtype, requires_grad=True) for rows in (heads, tokens))
        seqlens = torch.ones(2, dtype=torch.int64) if lengths else None
        attention_pool(query, x, seqlens=seqlens).backward(torch.empty_like(query))

    return run


def _layer_norm(stream: torch.dtype, width: int, added: torch.dtype | None = None) -> Case:
    def run() -> None:
        x, residual = (torch.empty(64, width, dtype=dtype, requires_grad=True) for dtype in (added or stream, stream))
        weight, bias = (torch.empty(width, requires_grad=True) for _ in range(2))
        results = layer_norm(x, weight, bias, residual=residual)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])

    return run


def _layer_norm_pair(dtype: torch.dtype, width: int) -> Case:
    def run() -> None:
        x = torch.empty(64, width, dtype=dtype, requires_grad=True)
        weight_1, bias_1, weight_2, bias_2 = (torch.empty(width, requires_grad=True) for _ in range(4))
        results = layer_norm_pair(x, weight_1, bias_1, weight_2, bias_2)
        torch.autograd.backward(results, [torch.empty_like(result) for result in results])

    return run


def _bias_act(op: Callable[..., torch.Tensor], dtype: torch.dtype, width: int) -> Case:
    def run() -> None:
        x = torch.empty(64, width, dtype=dtype, requires_grad=True)
        op(x, torch.empty(width, requires_grad=True)).backward(torch.empty_like(x))

    return run


def _text_embed(dtype: torch.dtype, width: int, *, autocast: bool = False) -> Case:
    def run() -> None:
        # so many that the sums take three launches, one of each kind
        batch, length = 128, 77
        table = torch.empty(49408, width, dtype=dtype, requires_grad=True)
        positions = torch.empty(length, width, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x = text_embed(torch.zeros(batch, length, dtype=torch.int64), table, positions)
        x.backward(torch.empty_like(x))

    return run


def _patch_embed(dtype: torch.dtype, patch: int, pixels: torch.dtype, *, keep: int | None = None) -> Case:
    def run() -> None:
        size, embed_dim = 224, 768
        num_patches = (size // patch) ** 2
        kept = None if keep is None else torch.arange(keep).expand(2, keep)
        images = torch.empty(2, 3, size, size, dtype=pixels, requires_grad=pixels.is_floating_point)
        weight = torch.empty(embed_dim, 3, patch, patch, dtype=dtype, requires_grad=True)
        positions = torch.empty(1 + num_patches, embed_dim)
        embed = patch_embed(images, weight, torch.empty(embed_dim), positions, keep=kept)
        embed.backward(torch.empty_like(embed))

    return run
