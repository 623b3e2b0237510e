"""The layers of transformer blocks, with OpenCLIP's parameter names."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import (
    attention,
    attention_pool,
    bias_gelu,
    bias_gelu_fp8,
    bias_quick_gelu,
    bias_quick_gelu_fp8,
    fp8_linear,
    layer_norm,
    layer_norm_fp8,
)
from ..kernels.dtypes import autocast_dtype
from ..kernels.fp8 import Fp8Rows
from ..kernels.launch import triton_runs_on
from ..kernels.packing import Packing
from .packed_text import PackedText

Kind = TypeVar("Kind", bound=nn.Module)
# The attributes of a module that hold its hooks, which a call runs besides ``forward``.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Functions that are called with input, weight and output of each linear layer that multiplies in 8 bits, for metrics.
OBSERVERS: list[Callable[..., None]] = []


class PackedTokens(NamedTuple):
    """The bounds of packed sequences among tokens [1, T, width], and an upper bound of the sequences' lengths."""

    packing: Packing
    max_seqlen: int


class LayerNorm(nn.LayerNorm):
    """Layer norm whose output has the dtype of its input.

    Under autocast, PyTorch's layer norm would return float32, and the residual stream would have to be cast back.
    """

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each row by the model's layer norm: [..., width] -> [..., width]."""
        return layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)


class QuickGELU(nn.Module):
    """QuickGELU, x sigmoid(1.702 x): the approximation of GELU with which OpenAI's weights were trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply QuickGELU, the activation of OpenAI's models, to each element."""
        return x * torch.sigmoid(1.702 * x)


class InProjection(nn.Linear):
    """Projection to queries, keys and values: a layer that an adapter such as LoRA can wrap or replace.

    Its weight and bias belong to ``attn``, so that parameters and checkpoints have the names of
    ``nn.MultiheadAttention``.
    """

    def __init__(self, attn: "Attention") -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = attn.in_proj_weight.shape
        self.__dict__["attn"] = attn  # no submodule, as ``attn`` would be a child of its own child

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The weight of the packed projection of a model's attention, [3 * width, width]."""
        return self.__dict__["attn"].in_proj_weight

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """The bias of the packed projection of a model's attention, [3 * width]."""
        return self.__dict__["attn"].in_proj_bias


def has_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks, so that calling it does more than its ``forward``."""
    return any(map(module.__dict__.__getitem__, HOOKS))


def is_plain(module: nn.Module, *kinds: type[Kind]) -> TypeGuard[Kind]:
    """Return True if a module is of one of the classes ``kinds`` (no subclass), with the class's ``forward``, no hooks.

    A call of such a module does what its class does and nothing else, so its op may be fused with others. An adapter or
    FSDP's wrapper has another class, or a hook.
    """
    own = module.__dict__
    return type(module) in kinds and "forward" not in own and not any(map(own.__getitem__, HOOKS))


def takes_fp8(part: Any, linear: nn.Module) -> bool:
    """Return True if the layer ``linear`` of an attention or MLP can take rows in 8 bits from the op before it.

    It cannot while there are ``OBSERVERS``, because they need the layer's input before it is rounded.
    """
    return part.fp8 is not None and not OBSERVERS and is_plain(linear, InProjection, nn.Linear)


def project(
    x: Tensor | Fp8Rows, weight: Tensor, bias: Tensor | None, fp8: str | None = None, backend: str = "auto"
) -> Tensor:
    """Return ``x W^T + b`` for the tokens of a model, in 8 bits by the recipe ``fp8`` if that is not None."""
    if fp8 is None:
        assert isinstance(x, Tensor)
        return F.linear(x, weight, bias)
    y = fp8_linear(x, weight, bias, recipe=fp8, backend=backend)
    for observe in OBSERVERS:
        observe(x, weight, y)
    return y


def call_linear(layer: nn.Module, x: Tensor | Fp8Rows, fp8: str | None, backend: str) -> Tensor:
    """Call a linear layer of a model, or compute it in 8 bits if ``fp8`` is a recipe and the layer is plain."""
    if fp8 is None or not is_plain(layer, nn.Linear, InProjection):
        return layer(x)
    return project(x, layer.weight, layer.bias, fp8, backend)


def project_qkv(
    x: Tensor | Fp8Rows, weight: Tensor, bias: Tensor | None, fp8: str | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Return the packed projection of queries, keys and values, and the bias whose gradient attention is to compute.

    The attention kernel sums that gradient from values that it already has on the chip; the linear layer would read
    the gradient of qkv again.
    """
    return project(x, weight, None if bias is None else bias.detach(), fp8, backend), bias


def residual_norm(x: Tensor, branch: Tensor, norm: Any, *, fused: bool, in_fp8: bool = False) -> tuple[Tensor, Any]:
    """Return ``x + branch`` and ``norm(x + branch)``, in one kernel if ``fused``; then ``norm`` must be plain.

    With ``in_fp8``, that kernel writes the norm as rows in 8 bits.
    """
    if not fused:
        x = x + branch
        return x, norm(x)
    backend = getattr(norm, "backend", "auto")
    function: Any = layer_norm_fp8 if in_fp8 else layer_norm
    normed, x = function(branch, norm.weight, norm.bias, norm.eps, residual=x, backend=backend)
    return x, normed


def add_norm(x: Tensor, branch: Tensor | None, norm: nn.Module, *, in_fp8: bool = False) -> tuple[Tensor, Any]:
    """Return a block's residual stream ``x + branch`` and ``norm(x + branch)``; ``x`` and ``norm(x)`` for no branch.

    With ``in_fp8``, the normalised rows are in 8 bits if ``norm`` is plain and autocast does not change their dtype.
    """
    fused, of_norm = is_plain(norm, LayerNorm), x if branch is None else branch
    in_fp8 = in_fp8 and fused and of_norm.dtype == autocast_dtype(of_norm)
    if branch is not None:
        return residual_norm(x, branch, norm, fused=fused, in_fp8=in_fp8)
    if in_fp8 and isinstance(norm, LayerNorm):
        return x, layer_norm_fp8(x, norm.weight, norm.bias, norm.eps, backend=norm.backend)
    return x, norm(x)


def linear_gelu(
    linear: nn.Module, gelu: nn.Module, x: Tensor | Fp8Rows, backend: str, fp8: str | None = None, *,
    in_fp8: bool = False,
) -> Tensor | Fp8Rows:  # fmt: skip
    """Return ``gelu(linear(x))`` for the MLP of a transformer block; with ``in_fp8``, in 8 bits where a kernel does so.

    On a GPU, the activation kernel adds the bias, and its backward pass also sums the bias's gradient. On a CPU,
    PyTorch's linear layer adds the bias at no cost, and an addition outside of it would be another pass over memory.
    """
    is_exact = getattr(gelu, "approximate", "none") == "none"
    device = x.values.device if isinstance(x, Fp8Rows) else x.device
    is_fused = backend != "torch" and is_exact and triton_runs_on(device)
    if not is_fused or not is_plain(linear, nn.Linear) or not is_plain(gelu, nn.GELU, QuickGELU):
        return gelu(call_linear(linear, x, fp8, backend))
    bias_act: Any = bias_quick_gelu if isinstance(gelu, QuickGELU) else bias_gelu
    if in_fp8:
        bias_act = bias_quick_gelu_fp8 if isinstance(gelu, QuickGELU) else bias_gelu_fp8
    return bias_act(project(x, linear.weight, None, fp8, backend), linear.bias, backend=backend)


def take_rows(x: Tensor, rows: Tensor | PackedText | None) -> Tensor:
    """Return row ``rows[b]`` of each sequence b, or its first row if ``rows`` is None: [B, N, width] -> [B, width].

    Of packed texts, [1, T, width], the last row of each is returned, in their packed order.
    """
    if isinstance(rows, PackedText):
        return x[0].index_select(0, rows.last)
    return x[:, 0] if rows is None else x[torch.arange(len(x), device=x.device), rows]


def attend_row(
    x: Tensor,
    rows: Tensor | PackedText | None,
    heads: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    causal: bool,
    seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute one row of self-attention for each sequence, before the output projection: [B, N, width] -> [B, width].

    Args:
        x: the tokens.
        rows: [B], the row of each sequence to compute; None for the first; packed texts for the last of each.
        heads: the number of heads.
        weights, biases: of the projections to queries, keys and values.
        causal: each token attends only to itself and the tokens before it.
        seqlens: [B], the number of leading tokens of each sequence to attend to; None for all.
        backend: as for :func:`clipfast.kernels.attention_pool`.
    """
    q = F.linear(take_rows(x, rows), weights[0], biases[0]).unflatten(1, (heads, -1))
    packed = rows if isinstance(rows, PackedText) else None
    if causal and not isinstance(rows, PackedText):
        seen = torch.ones(len(x), dtype=torch.int64, device=x.device) if rows is None else rows + 1
        seqlens = seen if seqlens is None else torch.minimum(seen, seqlens)
    size = (heads, q.shape[2], x.shape[2])
    return single_query_attention(
        q, x, weights[1].reshape(size), weights[2].reshape(size), seqlens, backend, *biases[1:], packed=packed
    )


def single_query_attention(
    q: Tensor,
    tokens: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    seqlens: Tensor | None,
    backend: str,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    *,
    packed: PackedText | PackedTokens | None = None,
) -> Tensor:
    """Compute attention of one query per sequence and head, without projecting every token.

    W_k multiplies the query instead of the tokens, and W_v multiplies the pooled token. The result is the same,
    and one row is projected instead of all. The softmax sums to one, so that the bias of the values is added to the
    result. A bias of the keys cancels in the softmax.

    Args:
        q: [B, heads, head_dim], or [1, heads, head_dim] if every sequence has the same query.
        tokens: [B, N, width].
        weight_k, weight_v: [heads, head_dim, width].
        seqlens: [B], the number of leading tokens of each sequence to attend to; None for all.
        backend: as for :func:`clipfast.kernels.attention_pool`.
        bias_k, bias_v: [heads * head_dim], both or neither.
        packed: the sequences whose ``tokens`` are packed, [1, T, width].

    Returns:
        [B, heads * head_dim].
    """
    query = torch.einsum("bhd,hdc->bhc", q * q.shape[-1] ** -0.5, weight_k)
    query = query.to(tokens.dtype)
    if packed is None:
        pooled = attention_pool(query.expand(len(tokens), -1, -1), tokens, seqlens=seqlens, backend=backend)
    else:
        places: Any = {"cu_seqlens": packed.packing, "max_seqlen": packed.max_seqlen}
        query = query.expand(packed.packing.cu_seqlens.shape[0] - 1, -1, -1)
        pooled = attention_pool(query, tokens[0], **places, backend=backend)
    out = torch.einsum("bhc,hdc->bhd", pooled, weight_v).flatten(1)
    if bias_k is None or bias_v is None:
        return out
    # The gradient of the keys' bias is zero, even if other gradients are NaN. It must not be None, because
    # DistributedDataParallel waits for it. So a sum of no elements of the bias is added, which is 0.
    return out + (bias_v + bias_k[:0].sum()).to(out.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with the parameter names of ``nn.MultiheadAttention`` and with linear projections."""

    PARTS = ("in_proj", "out_proj")
    fp8: str | None = None  # the recipe of ``fp8_linear`` if the linear layers multiply in 8 bits

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal, self.backend = heads, causal, "auto"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.in_proj: nn.Module = InProjection(self)
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor | Fp8Rows, packing: Packing | None = None) -> Tensor:
        """Return the attention of every token: [B, N, width] -> [B, N, width]; [1, T, width] if they are packed."""
        in_proj, bias = self.in_proj, None
        if is_plain(in_proj, InProjection, nn.Linear) and in_proj.bias is not None:
            qkv, bias = project_qkv(x, in_proj.weight, in_proj.bias, self.fp8, self.backend)
        else:
            qkv = call_linear(in_proj, x, self.fp8, self.backend)
        options: Any = {"causal": self.causal, "bias": bias, "backend": self.backend}
        if packing is None:
            heads = attention(qkv, self.num_heads, **options)
        else:
            heads = attention(qkv[0], self.num_heads, cu_seqlens=packing, **options)[None]
        return call_linear(self.out_proj, heads, self.fp8, self.backend)

    def forward_row(self, x: Tensor, rows: Tensor | PackedText | None) -> Tensor:
        """Compute one row of the output of ``forward`` for each sequence: [B, N, width] -> [B, width]."""
        in_proj: Any = self.in_proj
        weights, bias = in_proj.weight.chunk(3), in_proj.bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        out = attend_row(x, rows, self.num_heads, weights, biases, causal=self.causal, backend=self.backend)
        return self.out_proj(out)


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    PARTS = ("c_proj", "gelu", "c_fc")
    backend = "auto"
    fp8: str | None = None

    def __init__(self, width: int, hidden: int, *, quick_gelu: bool, approximate: str = "none") -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU(approximate)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        """Return ``c_proj(gelu(c_fc(x)))``: [..., width] -> [..., width]."""
        in_fp8 = takes_fp8(self, self.c_proj)
        hidden = linear_gelu(self.c_fc, self.gelu, x, self.backend, self.fp8, in_fp8=in_fp8)
        return call_linear(self.c_proj, hidden, self.fp8, self.backend)


# ``lower_weights`` leaves the parameters of these modules and with these names in float32: they are small, and are only
# added to activations or scale them.
_FULL_MODULES = (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)
_FULL_PARAMETERS = ("positional_embedding", "class_embedding", "logit_scale", "logit_bias")


def lower_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the weights of matrix products and convolutions in ``model`` to ``dtype``, in place.

    Norms, embeddings, positions and logit_scale keep their dtype, as in OpenCLIP. In SigLIP, whose image tower is
    timm's in OpenCLIP, only the norms of the text tower keep their dtype. Activations have the dtype of the products.
    """
    text: Any = getattr(model, "text", None)
    if text is not None:
        kept = {id(parameter) for module in text.modules() if isinstance(module, nn.LayerNorm)
                for parameter in module.parameters()}  # fmt: skip
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
        return
    for module in model.modules():
        if isinstance(module, _FULL_MODULES):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name not in _FULL_PARAMETERS:
                parameter.data = parameter.data.to(dtype)


def lowered(x: Tensor, weight: Tensor) -> Tensor:
    """Cast activations of a model to the dtype of ``weight`` if that has 16 bits and ``x`` has more."""
    return x.to(weight.dtype) if weight.dtype.itemsize == 2 < x.dtype.itemsize else x
