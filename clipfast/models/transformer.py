"""Pre-norm transformer blocks, with OpenCLIP's parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import attention, bias_gelu, bias_quick_gelu, layer_norm
from ..kernels._launch import triton_runs_on


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
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
        if _is_plain(proj, InProjection):
            # attention makes the gradient of the bias from what it has at hand; a sum over qkv's would read it again
            bias = self.in_proj_bias
            qkv = F.linear(x, self.in_proj_weight, bias.detach())
        else:
            bias, qkv = None, proj(x)
        attn = attention(qkv, self.num_heads, causal=self.causal, bias=bias, backend=self.backend)
        return self.out_proj(attn)


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
        if not (fused and is_exact and _is_plain(fc, nn.Linear) and _is_plain(act, nn.GELU, QuickGELU)):
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
        attn = self.attn(self.ln_1(x))
        if _is_plain(self.ln_2, LayerNorm):
            normed, x = self.ln_2.of_sum(attn, x)
        else:
            x = attn + x
            normed = self.ln_2(x)
        return x + self.mlp(normed)


class Transformer(nn.Module):
    """A stack of blocks; ``grad_checkpointing`` recomputes each block in the backward pass."""

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, *, causal: bool, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.width = width
        self.grad_checkpointing = False
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
        for block in self.resblocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.grad_checkpointing and torch.is_grad_enabled()
                else block(x)
            )
        return x
