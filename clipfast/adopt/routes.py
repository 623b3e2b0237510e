"""``report_kernels``: a report of the kernels on which a model runs."""

from typing import Any

import torch
from torch import nn

from ..kernels import attention_route
from ..kernels.attention_pool import MAX_TOKENS
from ..kernels.dtypes import dtype_name
from ..kernels.hardware import target_name
from ..kernels.launch import arch_of
from ..models import CLIP
from ..models.layers import Attention
from ..models.resnet import AttentionPool2d
from ..models.siglip import LatentPool, SigLIPTrunk
from ..models.transformer import ResidualAttentionBlock, Transformer, plan
from . import report_places

ROUTES = {
    "short": "short (a program holds a head)",
    "unrolled": "unrolled (a program holds a head)",
    "looped": "looped",
    "two_phase": "two phases",
    "sdpa": "PyTorch's scaled_dot_product_attention",
}


def report_kernels(model: nn.Module, arch: int | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Report the kernels on which a model runs.

    Args:
        model: a model of :func:`create_model`, or a model of another library after :func:`apply_to_open_clip`,
            :func:`apply_to_hf` or :func:`apply_to_timm`.
        arch: compute capability of a GPU, such as 90 for sm_90; the default is that of the GPU of the model, of the
            GPU at hand if the model is on none, or 90. Models of other libraries do not use it.
        dtype: dtype of the activations, which under autocast is the autocast dtype. Models of other libraries do not
            use it.

    Returns:
        For a model of this package, a line for each tower, such as "visual.transformer: 11 x attention, 197 tokens, 12
        heads of 64: forward short (a program holds a head), backward two phases; last block: attention_pool of the row
        that is read, 12 queries of 768". For other models, a table with a line for each kind of module: its name, the
        number of such modules, the part, and the kernel or the reason why they were not replaced.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, CLIP):
        return report_places(model)
    if arch is None:
        device = model.logit_scale.device if model.logit_scale.device.type == "cuda" else None
        arch = arch_of(device or torch.device("cuda")) if torch.cuda.is_available() else 90
    lines = [f"on {target_name(arch)} with {dtype_name(dtype)}, by backend='auto'; a CPU takes PyTorch's kernel"]
    for name, module in model.named_modules():
        if isinstance(module, AttentionPool2d):
            tokens, width = module.positional_embedding.shape
            lines.append(f"{name}: attention_pool, {tokens} tokens, {module.num_heads} queries of {width}")
        elif isinstance(module, SigLIPTrunk):
            tokens, width = module.pos_embed.shape[1:]
            lines.append(f"{name}: {_attention(arch, dtype, module.blocks[0].attn, len(module.blocks), tokens, width)}")
            lines.append(f"{name}.attn_pool: {_latent_pool(tokens, module.attn_pool)}")
        elif isinstance(module, Transformer):
            tokens = model.get_parameter(name.replace("transformer", "positional_embedding")).shape[0]
            attn = next(block for block in module.modules() if isinstance(block, Attention))
            pools = plan(module, tokens).last is not None
            last = f"; last block: attention_pool of the row that is read, {attn.num_heads} queries of {module.width}"
            text = _attention(arch, dtype, attn, len(module.resblocks) - pools, tokens, module.width)
            lines.append(f"{name}: {text}{last if pools else ''}")
        elif isinstance(module, nn.ModuleList):
            recipes = [block.attn.fp8 for block in module if isinstance(block, ResidualAttentionBlock)]
            if any(recipes):
                count, recipe = len(recipes) - recipes.count(None), next(filter(None, recipes))
                lines.append(f"{name}: linear layers of {count} of {len(recipes)} blocks in 8 bits, recipe {recipe}")
    return "\n".join(lines)


def _attention(arch: int, dtype: torch.dtype, attn: Any, layers: int, tokens: int, width: int) -> str:
    """Return the line of the report about the attention kernels of the blocks of a tower of clipfast."""
    heads, head_dim, causal = attn.num_heads, width // attn.num_heads, attn.causal
    route = attention_route(arch, dtype, head_dim, tokens, causal=causal)
    return (
        f"{layers} x attention, {tokens} tokens{', causal' if causal else ''}, {heads} heads of {head_dim}: "
        f"forward {ROUTES[route.forward]}, backward {ROUTES[route.backward]}"
    )


def _latent_pool(tokens: int, pool: LatentPool) -> str:
    """Return the words of the report for attention pooling with a learned query: our op, or PyTorch's attention."""
    if tokens > MAX_TOKENS:
        return f"{ROUTES['sdpa']}, {tokens} tokens"
    return f"attention_pool, {tokens} tokens, {pool.num_heads} queries of {pool.latent.shape[-1]}"
