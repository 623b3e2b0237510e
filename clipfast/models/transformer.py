"""Pre-norm transformer blocks with OpenCLIP's parameter names, and the plan of what they fuse, leave out or recompute.

The classes come first. The functions below them, and those of :mod:`.layers` and :mod:`.recomputation` that they call,
decide everything that differs from the textbook:

    what                                                          when
    one function computes a block, or the last block's row        all its modules are plain, their backend is "auto", no
    (whole_block, whole_last_block)                               compiler, transform, mode or profiler must see the
                                                                  ops, and PyTorch's own attention is not the faster one
                                                                  by the kernel's tables of configurations
    a norm also adds the branch before it to the residual stream  the norm is plain
    the last block computes only the row that the tower reads     everything in it is plain, its backend is not "torch",
                                                                  and attention_pool takes that many tokens and heads
    attention computes the gradient of in_proj's bias             in_proj is plain
    the activation adds the bias of c_fc                          both are plain, the activation is exact, the backend
                                                                  is not "torch", and Triton runs on the device
    a text tower computes no token after the one it reads         :mod:`.texts` and :mod:`.packed_text` decide it
    the backward pass recomputes blocks, or only their norms and  grad_checkpointing is set, and gradients are recorded
    activations

A module is plain if calling it does what its class does and nothing else (``layers.is_plain``). Any other module is
called, so that hooks, adapters and wrapped blocks see what they would see if nothing were fused.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..kernels import backends
from ..kernels.attention_pool import MAX_HEADS, MAX_TOKENS
from ..kernels.common import as_rows
from ..kernels.dtypes import autocast_dtype
from ..kernels.implementations import MAX_HEAD_DIM, MAX_WIDTH, takes_sdpa
from ..kernels.launch import INTERPRET, triton_runs_on
from ..kernels.packing import Packing
from .block_parts import QUICK, Options, Parameters, cast_blocks
from .fp8_layers import SWITCHBACK
from .layers import (
    HOOKS,
    MLP,
    OBSERVERS,
    Attention,
    InProjection,
    LayerNorm,
    QuickGELU,
    add_norm,
    is_plain,
    take_rows,
    takes_fp8,
)  # fmt: skip
from .packed_text import PackedText
from .recomputation import is_watched, recomputed
from .whole_block import Memory, block_plans, block_without_gradients, whole_block
from .whole_last_block import last_row


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block: x = x + attn(ln_1(x)), then x = x + mlp(ln_2(x)).

    Attributes:
        PARTS: the names of norm, attention, norm and MLP.
    """

    PARTS = ("ln_1", "attn", "ln_2", "mlp")

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, causal: bool, quick_gelu: bool, approximate: str = "none",
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ln_1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads, causal=causal)
        self.ln_2 = LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio), quick_gelu=quick_gelu, approximate=approximate)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Return the residual stream after both branches: [B, N, width] -> [B, N, width].

        With a packing, x is [1, T, width], the tokens of one sequence after the other.
        """
        x, branch = run_plain([self], x, None, packing)
        return x if branch is None else x + branch


class Transformer(nn.Module):
    """A stack of transformer blocks.

    The activation is QuickGELU, or GELU with the argument ``approximate`` of ``nn.GELU``. ``eps`` is the epsilon of the
    layer norms.

    ``grad_checkpointing`` recomputes each block in the backward pass. With "selective", only norms and activations are
    recomputed, which saves about a third of the memory (of 16 x width values per token, 11 x width are kept).
    """

    def __init__(
        self, width: int, layers: int, heads: int, mlp_ratio: float, *, causal: bool, quick_gelu: bool = False,
        approximate: str = "none", eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width = width
        self.grad_checkpointing: bool | str = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(
                width, heads, mlp_ratio, causal=causal, quick_gelu=quick_gelu, approximate=approximate, eps=eps
            )
            for _ in range(layers)
        )

    def init_scaled(self) -> None:
        """Initialise the blocks like CLIP's text tower: output layers get smaller weights in deeper stacks."""
        output_std = self.width**-0.5 * (2 * len(self.resblocks)) ** -0.5
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.normal_(module.in_proj_weight, std=self.width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=output_std)
            elif isinstance(module, MLP):
                nn.init.normal_(module.c_fc.weight, std=(2 * self.width) ** -0.5)
                nn.init.normal_(module.c_proj.weight, std=output_std)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Return the residual stream after all blocks: [B, N, width] -> [B, N, width]; [1, T, width] if packed."""
        x, branch = run_blocks(plan(self), x, packing)
        return x if branch is None else x + branch


class Plan(NamedTuple):
    """The plan of one call of a transformer: which blocks run in full, and what the backward pass recomputes."""

    recompute: bool | str  # whether the backward pass recomputes blocks; "selective" recomputes only cheap ops
    blocks: Sequence[nn.Module]  # the blocks that compute every row (token)
    last: ResidualAttentionBlock | None = None  # the last block, if it computes only the row that is read


def plan(transformer: Transformer, num_tokens: int | None = None) -> Plan:
    """Decide which ops of a transformer one call fuses, skips or recomputes.

    Args:
        transformer: the stack.
        num_tokens: the number of tokens in a sequence if the caller needs only one row of the output; None if it needs
            every row.
    """
    recompute = torch.is_grad_enabled() and transformer.grad_checkpointing
    blocks = list(transformer.resblocks)
    if num_tokens is None or num_tokens > MAX_TOKENS or not blocks or not is_plain(transformer, Transformer):
        return Plan(recompute, blocks)
    last = blocks[-1]
    if not is_plain(last, ResidualAttentionBlock) or plain_parts(last) is None or last.attn.num_heads > MAX_HEADS:
        return Plan(recompute, blocks)
    # The attention of a single row has no form in 8 bits.
    if last.attn.fp8 is not None or last.mlp.fp8 is not None or last.attn.backend == "torch":
        return Plan(recompute, blocks)
    return Plan(recompute, blocks[:-1], last)


def read_rows(transformer: nn.Module, x: Tensor, rows: Tensor | PackedText | None = None) -> Tensor:
    """Compute only the row of ``transformer(x)`` that a tower uses, such as the class token's.

    Args:
        transformer: the stack of a tower, or a module by which the user has replaced it.
        x: [B, N, width], or packed texts [1, T, width], which the stack takes (:func:`.texts.takes_packed`).
        rows: [B], the index of the row in each sequence; None for the first row; packed texts for the last row of each.

    Returns:
        [B, width].
    """
    packed = rows if isinstance(rows, PackedText) else None
    packing = None if packed is None else packed.packing
    length = x.shape[1] if packed is None else packed.max_seqlen
    steps = plan(transformer, length) if isinstance(transformer, Transformer) else None
    if steps is None or steps.last is None:
        row = take_rows(transformer(x) if packing is None else transformer(x, packing), rows)
    else:
        row, _ = run_blocks(steps, x, packing, rows=rows)
    return row if packed is None else row.index_select(0, packed.order)


def run_blocks(
    steps: Plan, x: Tensor, packing: Packing | None = None,
    kind: type[ResidualAttentionBlock] = ResidualAttentionBlock, rows: Tensor | PackedText | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run transformer blocks; return the residual stream and the last branch, which the caller must still add to it.

    With a ``packing``, x is [1, T, width], the tokens of one sequence after the other. ``kind`` is the class of blocks
    whose ops are fused; blocks of other classes are called as modules. If the plan has a last block, the result is its
    ``rows`` (see :func:`read_rows`), [B, width], and no branch.
    """
    branch: Tensor | None = None
    plain: list[ResidualAttentionBlock] = []
    packed = () if packing is None else (packing,)
    selective: dict[nn.Module, Any] = {}
    if steps.recompute == "selective":
        # These blocks recompute norms and activations anyway.
        whole = whole_blocks([b for b in steps.blocks if is_plain(b, kind)], x, packing is not None)
        selective = {block: options for block, (_, options) in whole.items() if options.recomputes_inputs}
    for block in steps.blocks:
        if is_plain(block, kind) and (not steps.recompute or block in selective):
            plain.append(block)
            continue
        x, branch = run_plain(plain, x, branch, packing)
        # Checkpointing keeps its arguments: the sum is one tensor, while x and the branch would be two.
        x, branch, plain = x if branch is None else x + branch, None, []
        x = recomputed(steps.recompute, block, x, *packed) if steps.recompute else block(x, *packed)
    if steps.recompute and steps.last is not None:
        x, branch = run_plain(plain, x, branch, packing)
        x = x if branch is None else x + branch
        return recomputed(steps.recompute, _last_row, steps.last, x, rows), None
    return run_plain(plain, x, branch, packing, steps.last, rows)


def run_plain(
    blocks: Sequence[ResidualAttentionBlock], x: Tensor, branch: Tensor | None, packing: Packing | None = None,
    last: ResidualAttentionBlock | None = None, rows: Tensor | PackedText | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run blocks without calling them; return the residual stream and the last branch, as :func:`run_blocks`.

    After the blocks, ``last`` runs if it is not None. Then the ``rows`` of its output [B, width] take the place of the
    stream, and there is no branch.
    """
    whole = whole_blocks(blocks if last is None else [*blocks, last], x, packing is not None)
    bounds, packed = (None, ()) if packing is None else (packing.bounds, (packing,))
    # The backward pass needs the cast weights of all blocks, so one launch casts them. Without a backward pass, those
    # of one block at a time take less memory, which the next block reuses.
    of_casts: dict[int, Sequence[Tensor]] | None = None if torch.is_grad_enabled() else {}
    cast = dict(zip(whole, cast_blocks(whole.values()), strict=True)) if whole and of_casts is None else {}
    shape, before, alike = x.shape, None, 0
    plans: Any = None
    memory: Memory | None = None
    for block in blocks:
        if block in whole:
            parameters, options = whole[block]
            of_block = cast[block] if of_casts is None else cast_blocks([whole[block]], of_casts)[0]
            if x.ndim == 3:
                x, branch = _as_rows(x, branch)
            # The stream and the branch have the same layout after each block with the same options.
            before, alike = options, alike + 1 if options is before else 0
            plans = plans if alike > 1 else block_plans(options, bounds, shape, x, branch)
            if of_casts is None:
                x, branch = whole_block(plans, shape, x, branch, parameters, options, of_block, bounds)
            else:
                memory = memory if alike > 1 else None
                x, branch, memory = block_without_gradients(plans, shape, x, branch, options, of_block, bounds, memory)
        else:
            before = memory = None
            x, branch = _in_shape(shape, x, branch)
            attn, mlp = block.attn, block.mlp
            in_fp8 = is_plain(attn, Attention) and takes_fp8(attn, attn.in_proj)
            x, normed = add_norm(x, branch, block.ln_1, in_fp8=in_fp8)
            in_fp8 = is_plain(mlp, MLP) and takes_fp8(mlp, mlp.c_fc)
            x, normed = add_norm(x, attn(normed, *packed), block.ln_2, in_fp8=in_fp8)
            branch = mlp(normed)
    if last is not None and any(block not in whole for block in blocks):
        # Hooks in these blocks may have changed the last block, so it is looked at once more.
        return run_plain([], *_in_shape(shape, x, branch), packing, last, rows)
    if last is not None and last in whole:
        of_block = cast[last] if of_casts is None else cast_blocks([whole[last]], of_casts)[0]
        stream = _as_rows(x, branch) if x.ndim == 3 else (x, branch)
        return last_row(shape, *stream, rows, *whole[last], of_block), None
    x, branch = _in_shape(shape, x, branch)
    return (x, branch) if last is None else (_row_of_modules(last, x, branch, rows), None)


def _as_rows(x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a residual stream and its branch [B, N, width], which may be rows already, as rows [B * N, width]."""
    return as_rows(x), None if branch is None else as_rows(branch)


def _in_shape(shape: torch.Size, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a residual stream and its branch, which may be rows [B * N, width], in their shape [B, N, width]."""
    if x.ndim == 3:
        return x, branch
    return x.view(shape), None if branch is None else branch.view(shape)


def plain_parts(block: ResidualAttentionBlock) -> tuple[Any, ...] | None:
    """Return the modules of a block in the order of :data:`_KINDS`, or None unless all are plain (``layers.is_plain``).

    A module that an adapter or a wrapper has changed is of another class, or has hooks. Every call of a model checks
    all its modules, and a call of ``is_plain`` for each would take longer than the checks below.
    """
    norm_1, attn, norm_2, mlp = map(block._modules.get, block.PARTS)
    if attn.__class__ is not Attention or mlp.__class__ is not MLP:
        return None
    parts: Any = attn, mlp, norm_1, norm_2, *map(attn._modules.get, attn.PARTS), *map(mlp._modules.get, mlp.PARTS)
    if tuple(map(type, parts)) not in _PLAIN_CLASSES:
        return None
    for part in parts:
        own = part.__dict__
        if "forward" in own or own[_AFTER] or own[_BEFORE] or own[_BACKWARD] or own[_BEFORE_BACKWARD]:
            return None
    return parts


def _plain_parameters(parts: tuple[Any, ...], device: torch.device) -> Parameters | None:
    """Return the parameters of a block's plain modules, or None unless all are contiguous tensors on ``device``."""
    attn, _, norm_1, norm_2, in_proj, out_proj, c_proj, _, c_fc = parts
    try:
        of_in_proj = _IN_PROJ_OF(attn._parameters) if in_proj.__class__ is InProjection else _OF(in_proj._parameters)
        others = *_OF(out_proj._parameters), *_OF(c_proj._parameters), *_OF(c_fc._parameters)
        found = Parameters(*_OF(norm_1._parameters), *_OF(norm_2._parameters), *of_in_proj, *others)
    except KeyError:  # a user has deleted a parameter of the module
        return None
    are_own = {*map(type, found)}.issubset(backends.PLAIN) and {*map(_DEVICE_OF, found)} == {device}
    return found if are_own and all(map(Tensor.is_contiguous, found)) else None


def whole_blocks(
    blocks: Sequence[ResidualAttentionBlock], x: Tensor, is_packed: bool = False
) -> dict[nn.Module, tuple[Parameters, Options]]:
    """Return the blocks that :mod:`.whole_block` computes for a residual stream like ``x``.

    No compiler, transform, mode or profiler may need to see the ops (``backends.is_watched``), and all modules of a
    block must be plain.
    """
    if not blocks or is_watched() or OBSERVERS or _has_any_global_hook() or x.__class__ not in backends.PLAIN:
        return {}
    if x.ndim != 3 or x.is_meta or x.is_neg() or x.numel() == 0:
        return {}
    device, dtype, (_, tokens, width) = x.device, autocast_dtype(x), x.shape
    on_triton = triton_runs_on(device)
    if width > MAX_WIDTH or (on_triton and not {dtype, x.dtype} <= _ON_TRITON):
        return {}
    is_cast = dtype != torch.float64 and device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type)
    castable = _CASTABLE if is_cast else {dtype}  # autocast casts weights of the dtypes in _CASTABLE
    found: dict[nn.Module, tuple[Parameters, Options]] = {}
    decided: dict[Any, Any] = {}
    for block in blocks:
        parts = plain_parts(block)
        parameters = None if parts is None else _plain_parameters(parts, device)
        if parts is None or parameters is None:
            continue
        dtypes = tuple(map(_DTYPE_OF, parameters))
        if not castable.issuperset(dtypes[4:]):
            continue
        attn, mlp, norm_1, norm_2, gelu = *parts[:4], parts[7]
        shapes = (
            parameters.norm_1.shape, parameters.w_in.shape, parameters.w_out.shape, parameters.w_proj.shape,
            parameters.w_fc.shape,
        )  # fmt: skip
        settings = (
            attn.num_heads, attn.causal, norm_1.eps, norm_2.eps,
            QUICK if gelu.__class__ is QuickGELU else gelu.approximate, attn.fp8, mlp.fp8,
            norm_1.backend == norm_2.backend == attn.backend == mlp.backend == "auto", shapes, dtypes,
        )  # fmt: skip
        options = decided.get(settings, _UNKNOWN)
        if options is _UNKNOWN:
            options = _options(*settings, width, device, dtype, on_triton, None if is_packed else tokens)
            decided[settings] = options
        if options is not None:
            found[block] = parameters, options
    return found


def _options(
    heads: int, causal: bool, eps_1: float, eps_2: float, gelu: str, fp8: str | None, fp8_of_mlp: str | None,
    is_auto: bool, shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...], width: int, device: torch.device,
    dtype: torch.dtype, on_triton: bool, tokens: int | None,
) -> Options | None:  # fmt: skip
    """Return the settings of a block that :mod:`.whole_block` computes, or None if it cannot compute the block."""
    *others, of_fc = shapes
    wanted = [(width,), (3 * width, width), (width, width), (width, of_fc[0])]
    if not is_auto or fp8 != fp8_of_mlp or width % heads or others != wanted:
        return None
    head_dim = width // heads
    if head_dim > MAX_HEAD_DIM:
        return None
    if tokens is not None and takes_sdpa("auto", device, dtype, head_dim, tokens, None, causal):
        return None
    adds_bias = on_triton and gelu != "tanh"
    of_each: Any = Parameters(*dtypes)  # type: ignore[arg-type]
    of_mlp = gelu, adds_bias, dtype, of_each, of_fc[0]
    return Options(heads, causal, head_dim**-0.5, eps_1, eps_2, *of_mlp, fp8, fp8 == SWITCHBACK)


def _last_row(last: ResidualAttentionBlock, x: Tensor, rows: Tensor | PackedText | None) -> Tensor:
    """Return rows of the last block's output: [B, N, width] -> [B, width]."""
    packing = rows.packing if isinstance(rows, PackedText) else None
    return run_plain([], x, None, packing, last, rows)[0]


def _row_of_modules(
    last: ResidualAttentionBlock, x: Tensor, branch: Tensor | None, rows: Tensor | PackedText | None
) -> Tensor:
    """Run the last block's modules for ``x + branch``; return rows of their output: [B, N, width] -> [B, width]."""
    x, normed = add_norm(x, branch, last.ln_1)
    x, normed = add_norm(take_rows(x, rows), last.attn.forward_row(normed, rows), last.ln_2)
    return x + last.mlp(normed)


# The dtypes in which the Triton kernels compute (see ``check_float``); Triton's interpreter has no bfloat16.
_ON_TRITON = {torch.float32, torch.float16} | (set() if INTERPRET else {torch.bfloat16})
# The classes of a plain block's modules: attention, MLP, both norms, in_proj, out_proj, c_proj, gelu and c_fc.
_KINDS = (
    (Attention,), (MLP,), *[(LayerNorm,)] * 2, (InProjection, nn.Linear), *[(nn.Linear,)] * 2, (nn.GELU, QuickGELU),
    (nn.Linear,),
)  # fmt: skip
_PLAIN_CLASSES = {*itertools.product(*_KINDS)}
_AFTER, _BEFORE, _BACKWARD, _BEFORE_BACKWARD = HOOKS
_OF, _IN_PROJ_OF = operator.itemgetter("weight", "bias"), operator.itemgetter("in_proj_weight", "in_proj_bias")
_DEVICE_OF, _DTYPE_OF = operator.attrgetter("device"), operator.attrgetter("dtype")
_UNKNOWN = object()
_CASTABLE = {torch.float32, torch.float16, torch.bfloat16}
