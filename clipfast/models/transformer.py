"""Pre-norm transformer blocks, with OpenCLIP's parameter names."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..kernels import attention, attention_pool, bias_gelu, bias_quick_gelu, layer_norm, layer_norm_pair
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..kernels.launch import triton_runs_on

# What selective checkpointing does not compute again.
_EXPENSIVE = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.clipfast.attention_fwd.default,
    torch.ops.clipfast.attention_pool_fwd.default,
)


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what its kind does, and nothing else: no adapter, no hook."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in kinds and not any(hooks)


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's dtype: autocast would otherwise widen the residual stream to float32, and a cast back
    would follow.
    """

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)

    def of_sum(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of x + residual, and that sum: two tensors [..., width]."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend)

    def then(self, norm: "LayerNorm", x: Tensor) -> tuple[Tensor, Tensor]:
        """This norm of x, and ``norm`` of that: two tensors [..., width]."""
        both = (self.weight, self.bias, norm.weight, norm.bias, self.eps, norm.eps)
        return layer_norm_pair(x, *both, backend=self.backend)


def _norm_of_sum(norm: nn.Module, branch: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """What ``norm`` makes of ``x + branch``, and that sum."""
    if branch is None:
        return norm(x), x
    if isinstance(norm, LayerNorm) and is_plain(norm, LayerNorm):
        return norm.of_sum(branch, x)
    x = x + branch
    return norm(x), x


def _rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """[B, N, width] -> [B, width], the first row of each sequence or that of its number in ``rows``."""
    return x[:, 0] if rows is None else x[torch.arange(len(x), device=x.device), rows]


def pooled_attention(
    q: Tensor, tokens: Tensor, weight_k: Tensor, weight_v: Tensor, seqlens: Tensor | None, backend: str
) -> Tensor:
    """Attention of one query per image and head, without projecting every token.

    W_k goes to the query, and W_v to what it pooled: the same function, with one row to project in place of all. A bias
    of the keys would change no weight of the softmax, and the weights' sum is one, so that of the values is the
    caller's to add.

    Args:
        q: [B, heads, head_dim].
        tokens: [B, N, width].
        weight_k, weight_v: [heads, head_dim, width].
        seqlens: [B], how many tokens of each image are seen; default all.
        backend: of :func:`clipfast.kernels.attention_pool`.

    Returns:
        [B, heads * head_dim].
    """
    query = torch.einsum("bhd,hdc->bhc", q * q.shape[-1] ** -0.5, weight_k)
    pooled = attention_pool(query.to(tokens.dtype), tokens, seqlens=seqlens, backend=backend)
    return torch.einsum("bhc,hdc->bhd", pooled, weight_v).flatten(1)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return x * torch.sigmoid(1.702 * x)


class InProjection(nn.Linear):
    """Projection to queries, keys and values, as a layer that an adapter such as LoRA can wrap or replace.

    Its weight and bias belong to ``attn``, so that parameters and checkpoints have the names of
    ``nn.MultiheadAttention``.
    """

    def __init__(self, attn: "Attention") -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = attn.in_proj_weight.shape
        self.__dict__["attn"] = attn  # not as a module, which would be its own child

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """[3 * width, width]."""
        return self.__dict__["attn"].in_proj_weight

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """[3 * width]."""
        return self.__dict__["attn"].in_proj_bias


class Attention(nn.Module):
    """Multi-head self-attention; parameters as in ``nn.MultiheadAttention``, and both projections as linear layers."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal, self.backend = heads, causal, "auto"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.in_proj: nn.Module = InProjection(self)
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        proj = self.in_proj
        if is_plain(proj, InProjection):
            # attention makes the gradient of the bias from what it has at hand; a sum over qkv's would read it again
            bias = self.in_proj_bias
            qkv = F.linear(x, self.in_proj_weight, bias.detach())
        else:
            bias, qkv = None, proj(x)
        attn = attention(qkv, self.num_heads, causal=self.causal, bias=bias, backend=self.backend)
        return self.out_proj(attn)

    def pooled(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """One row of what ``forward`` gives: [B, N, width] -> [B, width]."""
        weight_q, weight_k, weight_v = self.in_proj_weight.unflatten(0, (3, self.num_heads, -1)).unbind()
        bias_q, _, bias_v = self.in_proj_bias.unflatten(0, (3, -1)).unbind()
        q = F.linear(_rows_of(x, rows), weight_q.flatten(0, 1), bias_q).unflatten(1, (self.num_heads, -1))
        seqlens = None if rows is None or not self.causal else rows + 1
        attn = pooled_attention(q, x, weight_k, weight_v, seqlens, self.backend)
        return self.out_proj(attn + bias_v.to(attn.dtype))


class MLP(nn.Module):
    """Two linear layers around the activation."""

    backend = "auto"

    def __init__(self, width: int, hidden: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.c_proj(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        fc, act = self.c_fc, self.gelu
        # PyTorch's linear adds the bias for nothing on a CPU, where apart it would be one more pass
        fused = self.backend != "torch" and triton_runs_on(x.device)
        is_exact = getattr(act, "approximate", "none") == "none"
        if not (fused and is_exact and is_plain(fc, nn.Linear) and is_plain(act, nn.GELU, QuickGELU)):
            return act(fc(x))
        bias_act = bias_quick_gelu if isinstance(act, QuickGELU) else bias_gelu
        # the activation makes the gradient of the bias in passing; the linear layer would read its output's for it
        return bias_act(F.linear(x, fc.weight), fc.bias, backend=self.backend)


class ResidualAttentionBlock(nn.Module):
    """x + attn(ln_1(x)), then + mlp(ln_2(.))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, causal: bool, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal=causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), quick_gelu=quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        branch, x = self.split(None, x)
        return x + branch

    def split(self, branch: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the MLP adds to the stream, and the stream without it; so is the stream that comes in given.

        The next layer norm does the addition in its own pass.
        """
        return self.split_normed(*_norm_of_sum(self.ln_1, branch, x))

    def split_normed(self, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same where ``ln_1`` of the stream is there already."""
        normed, x = _norm_of_sum(self.ln_2, self.attn(normed), x)
        return self.mlp(normed), x

    def takes_after(self, norm: nn.Module) -> bool:
        """Whether ``norm``, in front of the block, and ``ln_1`` can be one pass."""
        plain = is_plain(norm, LayerNorm) and is_plain(self.ln_1, LayerNorm)
        return plain and is_plain(self, ResidualAttentionBlock)

    def pooled(self, branch: Tensor | None, x: Tensor, rows: Tensor | None) -> Tensor:
        """One row of the stream behind the block: [B, N, width] -> [B, width]."""
        normed, x = _norm_of_sum(self.ln_1, branch, x)
        normed, x = _norm_of_sum(self.ln_2, self.attn.pooled(normed, rows), _rows_of(x, rows))
        return x + self.mlp(normed)

    def can_pool(self, num_tokens: int) -> bool:
        """Whether nothing is in the block that may want to see every row; the reference computes them all."""
        fits = num_tokens <= MAX_TOKENS and self.attn.num_heads <= MAX_HEADS and self.attn.backend != "torch"
        return fits and all(is_plain(module, *_BLOCK_MODULES) for module in self.modules())


_BLOCK_MODULES = (
    ResidualAttentionBlock, LayerNorm, Attention, InProjection, MLP, nn.Linear, nn.GELU, QuickGELU,
)  # fmt: skip


class Transformer(nn.Module):
    """A stack of blocks.

    ``grad_checkpointing`` recomputes each block in the backward pass; if it is "selective", norms and activations only,
    which saves about a third of the memory (11 of 16 widths per token stay).
    """

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, *, causal: bool, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.width = width
        self.grad_checkpointing: bool | str = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, causal=causal, quick_gelu=quick_gelu) for _ in range(layers)
        )

    def init_scaled(self) -> None:
        """Initialise for the depth, as the text tower was published: output layers shrink with the number of blocks."""
        output_std = self.width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.in_proj_weight, std=self.width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=output_std)
            elif isinstance(module, MLP):
                nn.init.normal_(module.c_fc.weight, std=(2 * self.width) ** -0.5)
                nn.init.normal_(module.c_proj.weight, std=output_std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, width] -> [B, N, width]."""
        branch, x = self._run(list(self.resblocks), x)
        return x if branch is None else x + branch

    def pooled(self, x: Tensor, rows: Tensor | None, norm: nn.Module | None, last: ResidualAttentionBlock) -> Tensor:
        """One row of what ``forward`` gives for each sequence, all that ``last``, the last block, then computes.

        See :func:`pooled`.
        """
        branch, x = self._run(list(self.resblocks)[:-1], x, norm)
        if self._recomputes():
            return self._recomputed(last.pooled, branch, x, rows)
        return last.pooled(branch, x, rows)

    def _run(
        self, blocks: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """The stream behind ``norm`` and ``blocks``, its last addition not done where the next norm can do it."""
        branch: Tensor | None = None
        first = blocks[0] if blocks and not self._recomputes() else None
        if isinstance(norm, LayerNorm) and isinstance(first, ResidualAttentionBlock) and first.takes_after(norm):
            stream, normed = norm.then(first.ln_1, x)
            branch, x = first.split_normed(normed, stream)
            blocks = blocks[1:]
        elif norm is not None:
            x = norm(x)
        for block in blocks:
            if self._recomputes():
                # of one tensor: two would be kept for each block
                x = self._recomputed(block, x)
            elif isinstance(block, ResidualAttentionBlock) and is_plain(block, ResidualAttentionBlock):
                branch, x = block.split(branch, x)
            else:
                x = block(x if branch is None else x + branch)
                branch = None
        return branch, x

    def _recomputes(self) -> bool:
        return bool(self.grad_checkpointing) and torch.is_grad_enabled()

    def _recomputed(self, function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
        if self.grad_checkpointing != "selective":
            return checkpoint(function, *args, use_reentrant=False)
        kept = functools.partial(create_selective_checkpoint_contexts, list(_EXPENSIVE))
        return checkpoint(function, *args, use_reentrant=False, context_fn=kept)

    def pooling_block(self, num_tokens: int) -> ResidualAttentionBlock | None:
        """The last block, if it may compute only the row that is read."""
        last = self.resblocks[-1] if is_plain(self, Transformer) and len(self.resblocks) else None
        return last if isinstance(last, ResidualAttentionBlock) and last.can_pool(num_tokens) else None


def pooled(transformer: nn.Module, x: Tensor, rows: Tensor | None = None, *, norm: nn.Module | None = None) -> Tensor:
    """The rows of ``transformer(x)`` that a tower reads, or of ``transformer(norm(x))``.

    Args:
        transformer: of a tower; with a hook or an adapter in its last block it computes every row, as it does where
            something else has taken its place, and of more tokens than ``attention_pool`` takes.
        x: [B, N, width].
        rows: [B], the number of a row of each sequence; default the first.
        norm: in front of the first block, whose own norm is then computed in the same pass.

    Returns:
        [B, width].
    """
    if isinstance(transformer, Transformer) and (last := transformer.pooling_block(x.shape[1])) is not None:
        return transformer.pooled(x, rows, norm, last)
    return _rows_of(transformer(x if norm is None else norm(x)), rows)
