"""A report of the kernels that the attention layers of a model run on."""

import torch

from .kernels import attention_route
from .kernels.dtypes import dtype_name
from .models import CLIP
from .models.resnet import AttentionPool2d
from .models.transformer import Attention, Transformer, plan

ROUTES = {
    "short": "short (a program holds a head)",
    "unrolled": "unrolled (a program holds a head)",
    "looped": "looped",
    "two_phase": "two phases",
    "sdpa": "PyTorch's scaled_dot_product_attention",
}


def report(model: CLIP, arch: int | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
    """Say which kernels the attention layers of a model run on, one line for each tower.

    Args:
        model: of :func:`create_model`.
        arch: compute capability of a GPU, such as 90 for sm_90; the default is that of the GPU of the model, of the
            GPU at hand if the model is on none, or 90.
        dtype: dtype of the activations, which under autocast is the autocast dtype.

    Returns:
        Lines such as "visual.transformer: 11 x attention, 197 tokens, 12 heads of 64: forward short (a program holds a
        head), backward two phases; last block: attention_pool of the row that is read, 12 queries of 768".
    """
    if arch is None:
        device = model.logit_scale.device if model.logit_scale.device.type == "cuda" else None
        major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)
        arch = 10 * major + minor
    lines = [f"on sm_{arch} with {dtype_name(dtype)}, by backend='auto'; a CPU takes PyTorch's kernel"]
    for name, module in model.named_modules():
        if isinstance(module, AttentionPool2d):
            tokens, width = module.positional_embedding.shape
            lines.append(f"{name}: attention_pool, {tokens} tokens, {module.num_heads} queries of {width}")
        elif isinstance(module, Transformer):
            tokens = model.get_parameter(name.replace("transformer", "positional_embedding")).shape[0]
            attn = next(block for block in module.modules() if isinstance(block, Attention))
            heads, head_dim, causal = attn.num_heads, module.width // attn.num_heads, attn.causal
            route = attention_route(arch, dtype, head_dim, tokens, causal=causal)
            pools = plan(module, tokens).last is not None
            last = f"; last block: attention_pool of the row that is read, {heads} queries of {module.width}"
            lines.append(
                f"{name}: {len(module.resblocks) - pools} x attention, {tokens} tokens{', causal' if causal else ''}, "
                f"{heads} heads of {head_dim}: forward {ROUTES[route.forward]}, backward {ROUTES[route.backward]}"
                f"{last if pools else ''}"
            )
    return "\n".join(lines)
