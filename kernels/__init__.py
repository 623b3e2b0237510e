"""Triton kernels for CLIP: each op with its gradients, its CPU path and a PyTorch reference that specifies it.

Each op stands in one file, or in a folder where it has several kernels. ``reference`` holds the specification of every
op in PyTorch, ``configs`` the launch configurations, ``hardware`` the limits and rates of GPUs. The host code that ops
share is in ``checks`` (input), ``backends`` (the implementation that an op runs), ``dtypes`` and ``launch`` (the one
place where a kernel starts). ``tiles`` has the arithmetic that kernels share.
"""

# With a checkout's root in sys.path, transformers takes this folder for the package "kernels" and imports it. This must
# not register the ops a second time.
if __name__ != "kernels":
    from . import reference
    from .activation import bias_gelu, bias_quick_gelu
    from .attention import attention, attention_qkv, attention_route
    from .attention_pool import attention_pool
    from .contrastive import contrastive_loss, distributed_contrastive_loss, info_nce_loss, nt_xent_loss, sigmoid_loss
    from .fp8 import (
        CachedWeights,
        Fp8Rows,
        Fp8Weight,
        bias_gelu_fp8,
        bias_quick_gelu_fp8,
        fp8_linear,
        layer_norm_fp8,
        quantize_rows,
        quantize_weight,
    )
    from .layer_norm import layer_norm
    from .patch_embed import patch_embed
    from .patch_embed_packed import patch_embed_packed
    from .retrieval import retrieval_ranks
    from .text_embed import text_embed
    from .top_k import top_k

    __all__ = [
        "CachedWeights",
        "Fp8Rows",
        "Fp8Weight",
        "attention",
        "attention_pool",
        "attention_qkv",
        "attention_route",
        "bias_gelu",
        "bias_gelu_fp8",
        "bias_quick_gelu",
        "bias_quick_gelu_fp8",
        "contrastive_loss",
        "distributed_contrastive_loss",
        "fp8_linear",
        "info_nce_loss",
        "layer_norm",
        "layer_norm_fp8",
        "nt_xent_loss",
        "patch_embed",
        "patch_embed_packed",
        "quantize_rows",
        "quantize_weight",
        "reference",
        "retrieval_ranks",
        "sigmoid_loss",
        "text_embed",
        "top_k",
    ]
