"""GELU and QuickGELU of a linear layer's output plus the layer's bias, and the gradient of the bias, in one pass.

With u_mn = x_mn + b_n, Phi the distribution function of the normal distribution and phi its density:

    GELU        y = u Phi(u)                    y' = Phi(u) + u phi(u)              Phi(u) = (1 + erf(u / sqrt(2))) / 2
    QuickGELU   y = u sigmoid(1.702 u)          y' = sigmoid(z) (1 + z sigmoid(-z))              z = 1.702 u

    dx = dy y'(u)           db_n = sum over rows of dx_mn

Bytes for M rows: forward 2 M N items, backward 3 M N. If the linear layer before the activation leaves its bias to
this op, no other pass over dx is needed to sum up the gradient of the bias.
FLOPs: about 20 M N in each direction; they take far less time than the bytes.
Method: GELU by the error function (Hendrycks and Gimpel 2016), and their approximation, which OpenAI's CLIP was
trained with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .backends import Op, registered, uses_reference
from .checks import check_float, check_parameter, check_tensor
from .common import as_rows, cdiv, new_tensors, num_rows, row_strides
from .configs import RowConfig, planned, row_config
from .dtypes import accumulate_dtype
from .fp8_rows import E4M3, LARGEST, lay_beside
from .launch import Plan, Start, arch_of, programs_at_once, triton_runs_on
from .spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, RowShape, Shipped, Target, Tunable, on
from .tiles import store_rows

# About how many registers a thread of each kernel takes, from which ``programs_at_once`` computes the size of the grid.
# The backward kernel also keeps its sums over rows in registers.
FWD_REGISTERS, BWD_REGISTERS = 64, 128
# This calls PyTorch's op without its Python wrapper, which would take the host longer.
_gelu_backward: Any = torch.ops.aten.gelu_backward.default._op


@triton.jit
def _quick_gelu(u):
    """Return QuickGELU(u) of a tile."""
    return u * tl.sigmoid(1.702 * u)


@triton.jit
def _quick_gelu_slope(u):
    """Return the derivative of QuickGELU at each element of a tile."""
    p = tl.sigmoid(1.702 * u)
    # The factor u comes last: 1.702 * u may be infinite, and infinity times zero would be NaN.
    return p + 1.702 * (p * (1.0 - p) * u)


@triton.jit
def _gelu(u):
    """Return GELU(u) of a tile, by the error function."""
    return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _gelu_slope(u):
    """Return the derivative of GELU at each element of a tile."""
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density


@triton.jit
def _bias_act_fwd_kernel(
    x_ptr,  # [M, N]
    bias_ptr,  # [N] contiguous
    y_ptr,  # [M, N] contiguous
    M, N, stride_xm, stride_xn,
    IS_QUICK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute GELU(x + bias), or QuickGELU, in the BLOCK_N columns of this program, which loads their bias once for all
    rows.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    first, step = (tl.program_id(0) // num_n).to(tl.int64), tl.num_programs(0) // num_n
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), step, num_stages=NUM_STAGES):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        mask = (rows < M) & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        u = x.to(tl.float32) + bias
        y = _quick_gelu(u) if IS_QUICK else _gelu(u)
        tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_act_bwd_kernel(
    grad_ptr,  # [M, N]
    x_ptr,  # [M, N]
    bias_ptr,  # [N] contiguous
    dx_ptr,  # [M, N] contiguous
    sums_ptr,  # [programs per column, N] fp32
    values_ptr,  # [M, N] contiguous, dx in 8 bits, or None; if dx is stored in 8 bits, BLOCK_N columns are a whole row
    scale_ptr,  # [M] fp32, the scales of the rows in values_ptr, or None
    y_ptr,  # [M, N] contiguous, the activation once more, or None
    M, N, stride_gm, stride_gn, stride_xm, stride_xn,
    IS_QUICK: tl.constexpr, HAS_SUMS: tl.constexpr, MOST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx in the BLOCK_N columns of this program, and sum dx over its rows for the gradient of the bias."""
    num_n = tl.cdiv(N, BLOCK_N)
    offs_n = (tl.program_id(0) % num_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]  # [1, BN]
    # acc is the sum of the tiles of dx, element by element. Its rows are added up once, after the loop.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first, step = (tl.program_id(0) // num_n).to(tl.int64), tl.num_programs(0) // num_n
    for tile in tl.range(first, tl.cdiv(M, BLOCK_M), step, num_stages=NUM_STAGES):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        rows = offs_m[:, None]
        mask = (rows < M) & mask_n[None, :]
        x = tl.load(x_ptr + rows * stride_xm + offs_n[None, :] * stride_xn, mask=mask, other=0.0)  # [BM, BN]
        dy = tl.load(grad_ptr + rows * stride_gm + offs_n[None, :] * stride_gn, mask=mask, other=0.0)  # [BM, BN]
        u = x.to(tl.float32) + bias
        dx = dy.to(tl.float32) * (_quick_gelu_slope(u) if IS_QUICK else _gelu_slope(u))
        if y_ptr is not None:
            y = _quick_gelu(u) if IS_QUICK else _gelu(u)
            tl.store(y_ptr + rows * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
        rounded = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows * N + offs_n[None, :], rounded, mask=mask)
        if scale_ptr is not None:
            store_rows(rounded.to(tl.float32), values_ptr, scale_ptr, offs_m, offs_n, offs_m < M, mask_n, N, MOST)
        if HAS_SUMS:
            acc += dx  # past the last row, dx is zero, because dy is zero there
    if HAS_SUMS:
        tl.store(sums_ptr + first * N + offs_n, tl.sum(acc, 0), mask=mask_n)


@planned
def _fwd_plan(device: torch.device, dtype: torch.dtype, rows: int, width: int, *strides: int, quick: bool) -> Plan:
    """Plan the launch of the bias-and-activation forward kernel for x [rows, width]."""
    cfg, _, grid, tile = _grid("bias_act_fwd", device, dtype, rows, width, FWD_REGISTERS)
    return Plan(_bias_act_fwd_kernel, grid, rows, width, *strides, config=cfg, device=device, IS_QUICK=quick, **tile)


@planned
def _bwd_plan(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, *strides: int, quick: bool, with_sums: bool,
    row_tiles: Callable[..., Any] | None,
) -> tuple[Plan, int]:  # fmt: skip
    """Plan the launch of the bias-and-activation backward kernel for x [rows, width].

    Returns:
        The plan, and the number of programs for each block of columns.
    """
    if row_tiles is None:
        cfg, per_block, grid, tile = _grid("bias_act_bwd", device, dtype, rows, width, BWD_REGISTERS)
    else:
        cfg, per_block, tile = row_tiles(rows, width, device)
        grid = (per_block,)
    plan = Plan(
        _bias_act_bwd_kernel, grid, rows, width, *strides, config=cfg, device=device, IS_QUICK=quick,
        HAS_SUMS=with_sums, MOST=None if row_tiles is None else LARGEST[E4M3], **tile,
    )  # fmt: skip
    return plan, per_block


def _grid(
    kernel: str, device: torch.device, dtype: torch.dtype, rows: int, width: int, registers: int
) -> tuple[RowConfig, int, tuple[int], dict[str, int]]:
    """Return how a bias-and-activation kernel is launched.

    Returns:
        The configuration, the number of programs for each block of columns, the grid, and the sizes of a tile.
    """
    cfg = row_config(kernel, arch_of(device), dtype)
    num_n = cdiv(width, cfg.block_n)
    at_once = programs_at_once(device, cfg.num_warps, registers)
    per_block = min(cdiv(rows, cfg.block_m), max(1, at_once // max(1, num_n)))
    tile = {"BLOCK_M": cfg.block_m, "BLOCK_N": cfg.block_n, "NUM_STAGES": cfg.num_stages}
    return cfg, per_block, (per_block * num_n,), tile


def _fwd_triton(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Tensor]:
    """Return the function that computes GELU(x + bias), or QuickGELU if ``quick``, by the Triton kernel."""
    strides, is_copied = row_strides(x)
    start = Start(_fwd_plan(x.device, x.dtype, num_rows(x), x.shape[-1], *strides, quick=quick))
    new_y = new_tensors(x)

    def compute(x: Tensor, bias: Tensor, _: bool, out: Tensor | None = None) -> Tensor:
        """Compute an activation with its bias by the kernel, for tensors of the planned layout; write it to ``out``."""
        y: Tensor = new_y() if out is None else out
        start(as_rows(x) if is_copied else x, bias.contiguous(), y)
        return y

    return compute


def _bwd_triton(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False,
    row_tiles: Callable[..., Any] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """Return the function that computes the gradients of bias and activation by the Triton kernel.

    With ``with_y``, that function also returns the activation y. With ``row_tiles``, which chooses the tiles of a
    kernel that holds whole rows, it returns the values and the scales of dx in 8 bits at the end.
    """
    width = x.shape[-1]
    (grad_strides, grad_copied), (strides, x_copied) = row_strides(grad), row_strides(x)
    plan, per_block = _bwd_plan(
        x.device, x.dtype, num_rows(x), width, *grad_strides, *strides, quick=quick, with_sums=with_sums,
        row_tiles=row_tiles,
    )  # fmt: skip
    start, new_dx = Start(plan), new_tensors(x)
    new_values, new_scale = new_tensors(x, None, E4M3), new_tensors(x, x.shape[:-1], torch.float32)
    new_sums = new_tensors(x, (per_block, width if with_sums else 0), torch.float32)

    def compute(grad: Tensor, x: Tensor, bias: Tensor, *_: bool) -> tuple[Tensor | None, ...]:
        """Compute the gradients of an activation and its bias by the kernels, for tensors of the planned layout."""
        dx, sums, y = new_dx(), new_sums(), new_dx() if with_y else None
        rows = (None, None) if row_tiles is None else (new_values(), new_scale())
        grad, x = as_rows(grad) if grad_copied else grad, as_rows(x) if x_copied else x
        start(grad, x, bias.contiguous(), dx, sums, *rows, y)
        found = dx, sums.sum(0) if with_sums else None, *((y,) if with_y else ())
        return found if row_tiles is None else (*found, *rows)

    return compute


def _fwd_cpu(x: Tensor, bias: Tensor, quick: bool) -> Callable[..., Tensor]:
    """Return the function that computes GELU(x + bias), or QuickGELU if ``quick``, in PyTorch."""
    dtype = accumulate_dtype(x.dtype)
    is_wide = x.dtype == dtype

    def compute(x: Tensor, bias: Tensor, *_: Any) -> Tensor:
        """Compute an activation with its bias on the CPU."""
        u = (x if is_wide else x.to(dtype)) + bias
        y = u * torch.sigmoid(1.702 * u) if quick else F.gelu(u)
        return (y if is_wide else y.to(x.dtype)).contiguous()

    return compute


def _bwd_cpu(
    grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool, with_y: bool = False
) -> Callable[..., Any]:
    """Return the function that computes the gradients of bias and activation in PyTorch, and the activation y after
    them if ``with_y``.
    """
    dtype = accumulate_dtype(x.dtype)
    is_wide, rows = x.dtype == dtype, list(range(x.ndim - 1))
    activate = _fwd_cpu(x, bias, quick)

    def compute(grad: Tensor, x: Tensor, bias: Tensor, *_: bool) -> tuple[Tensor | None, ...]:
        """Compute the gradients of an activation and its bias on the CPU."""
        y = (activate(x, bias, quick),) if with_y else ()
        u, grad = (x + bias, grad) if is_wide else (x.to(dtype) + bias, grad.to(dtype))
        if quick:
            p = torch.sigmoid(1.702 * u)
            dx = grad * (p + 1.702 * (p * (1 - p) * u))
        else:
            dx = _gelu_backward(grad, u)
        sums = (dx.sum(rows) if rows else dx.clone()) if with_sums else None
        return (dx if is_wide else dx.to(x.dtype)).contiguous(), sums, *y

    return compute


def _plan_fwd(x: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes GELU or QuickGELU for tensors with the layout of ``x``."""
    return (_fwd_triton if triton_runs_on(x.device) else _fwd_cpu)(x, *args)


def _plan_bwd(grad: Tensor, *args: Any) -> Callable[..., Any]:
    """Return the function that computes the gradients of GELU or QuickGELU for tensors with the arguments' layout."""
    return (_bwd_triton if triton_runs_on(grad.device) else _bwd_cpu)(grad, *args)


@registered("bias_act_fwd")
def _bias_act_fwd(x: Tensor, bias: Tensor, quick: bool) -> Tensor:
    """Compute GELU or QuickGELU of x + bias. This is the registered op."""
    y: Tensor = _plan_fwd(x, bias, quick)(x, bias, quick)
    return y


_bias_act_fwd.planned_by(_plan_fwd)


@_bias_act_fwd.register_fake
def _(x: Tensor, bias: Tensor, quick: bool) -> Tensor:
    return x.new_empty(x.shape)


def as_outputs(x: Tensor, dx: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients of an activation's input and bias for a registered op, which must return a tensor: an empty
    one if ``sums``, the gradient of the bias, is None.
    """
    return dx, x.new_empty(0, dtype=accumulate_dtype(x.dtype)) if sums is None else sums


def fake_gradients(x: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Return tensors without values in the shapes of the gradients of activation and bias."""
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if with_sums else 0, dtype=accumulate_dtype(x.dtype))


@registered("bias_act_bwd")
def _bias_act_bwd(grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of GELU or QuickGELU: of x, and of the bias in float32 (empty unless ``with_sums``)."""
    args = grad, x, bias, quick, with_sums
    return as_outputs(x, *_plan_bwd(*args)(*args))


_bias_act_bwd.planned_by(_plan_bwd)


@_bias_act_bwd.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor, quick: bool, with_sums: bool) -> tuple[Tensor, Tensor]:
    return fake_gradients(x, with_sums)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save x and bias for the backward pass of GELU or QuickGELU."""
    x, bias, ctx.quick = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor, op: Op = _bias_act_bwd) -> tuple[Tensor | None, ...]:
    """Return the gradients of GELU or QuickGELU of x + bias, which ``op`` computes, to autograd."""
    x, bias = ctx.saved_tensors
    options = ctx.quick, ctx.needs_input_grad[1]
    tensors, args = (grad, x, bias), (grad, x, bias, *options)
    dx, sums, *rows = (op.find(options, tensors) or op.learn(options, tensors, args))(*args)
    if rows:
        lay_beside(dx, *rows[-2:])
    if not options[1]:
        return dx, None, None
    return dx, sums if sums.dtype is bias.dtype else sums.to(bias.dtype), None


_bias_act_fwd.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute GELU(x + bias), by the error function.

    Autocast changes nothing: the sum and the function are computed in float32, and the result has the dtype of ``x``.

    Args:
        x: [..., N], float32, float16 or bfloat16 (float64 on the CPU), such as ``F.linear(h, weight)``; any strides
            (rows that do not lie evenly apart are copied first).
        bias: [N], of any floating dtype.
        backend: "auto" (Triton on GPUs, PyTorch on CPUs), "triton", or "torch" for the reference.

    Returns:
        [..., N] in the dtype of ``x``, contiguous.

    Raises:
        ValueError, TypeError: a shape, a device or a dtype that does not fit.
        RuntimeError: ``backend="triton"`` where Triton cannot run.
    """
    return _bias_act("bias_gelu", x, bias, backend)


def bias_quick_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute QuickGELU(x + bias), u sigmoid(1.702 u), which OpenAI's weights were trained with.

    The arguments, the result and the errors are those of :func:`bias_gelu`.
    """
    return _bias_act("bias_quick_gelu", x, bias, backend)


def _bias_act(op: str, x: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Check the input of bias_gelu or bias_quick_gelu and compute it."""
    options, tensors, args = (op, backend), (x, bias), (x, bias, op == "bias_quick_gelu")
    compute = _bias_act_fwd.find(options, tensors)
    if compute is not None:
        return compute(*args)
    check_tensor(op, "x", x, None)
    check_parameter(op, "bias", bias, x)
    if uses_reference(op, backend, x):
        return reference.bias_quick_gelu(x, bias) if args[2] else reference.bias_gelu(x, bias)
    check_float(op, x=x, bias=bias)
    return _bias_act_fwd.learn(options, tensors, args)(*args)


def make(shape: RowShape, values: str, draw: Draw) -> Call:
    """Make the input rows, the bias and the upstream gradient of a case; ``values`` says how large they are."""
    size = shape.rows, shape.width
    scale = {"large": 1e3, "tiny": 1e-4}.get(values, 1.0)
    x = 2 * scale * draw.normal(*size)
    if values == "range":
        x = torch.linspace(-60, 60, shape.elements, device=draw.device).view(size)
    bias = draw.normal(shape.width) * (scale if values == "tiny" else 1.0)
    return Call({"x": x, "bias": bias}, (draw.normal(*size),))


def floor(shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Count the operations and bytes of bias and activation, with the bias in float32.

    The forward pass reads x and writes the result. The backward pass reads x and the upstream gradient, and writes the
    gradients of x and of the bias.
    """
    tensors, parameters = (3, 2) if backward else (2, 1)
    return Floor(20 * shape.elements, tensors * shape.elements * itemsize + parameters * shape.width * 4)


FEW = 6  # draws that are judged as one, since a narrow bias has few gradients whose errors can be compared
CASES = [
    Case(RowShape(37, 3), "three columns", draws=FEW, sanitize=True),
    Case(RowShape(67, 77), "odd rows and an odd width", quick=True, sanitize=True),
    Case(RowShape(50, 3072), "B/32's MLP, an image", NOT_INTERPRETED),
    Case(RowShape(3, 5120), "H/14's MLP"),
    Case(RowShape(2, 8200), "wider than bigG/14's MLP, and no multiple of a tile"),
    Case(RowShape(37, 1), "one column", draws=FEW),
    Case(RowShape(37, 1024), "whole tiles of columns"),
    Case(RowShape(1, 24), "one row"),
    Case(RowShape(1033, 24), "many tiles of rows, the last one short"),
    Case(RowShape(0, 64), "no rows"),
    Case(RowShape(3, 0), "no columns"),
    Case(RowShape(257, 4096), "L/14's MLP, an image", NOT_INTERPRETED),
    Case(RowShape(65792, 4096), "L/14's MLP, a batch", on(CUDA)),
    *Case.layouts(RowShape(67, 40), expanded=RowShape(37, 72)),
    Case.extreme(RowShape(67, 40), "range", "from -60 to 60: both tails, and all between", quick=True),
    Case.extreme(RowShape(33, 72), "large", "values of thousands: a product of two overflows in 16 bits"),
    Case.extreme(RowShape(33, 72), "tiny", "next to zero, where the slope is a half"),
    *Case.repeats(RowShape(517, 96), RowShape(65792, 4096)),
]
# The number of tokens and the width of the MLP in the towers L/14, B/16, H/14 and bigG/14.
TOWERS = ((257, 4096), (197, 3072), (257, 5120), (257, 8192))
IMAGES = {"cpu": 4, "cuda": 256}
TILES = {"block_m": (2, 4, 8, 16), "block_n": (128, 256, 512, 1024), "num_warps": (2, 4, 8), "num_stages": (1, 2, 3)}
GELU = OpSpec(
    op=bias_gelu,
    reference=reference.bias_gelu,
    make=make,
    cases=CASES,
    small=(RowShape(10, 12),),
    category="norm, activation",
    torch_op="bias_act",
    kernels=("_bias_act_fwd_kernel", "_bias_act_bwd_kernel"),
    floor=floor,
    bench={
        device: tuple(RowShape(images * tokens, width) for tokens, width in TOWERS) for device, images in IMAGES.items()
    },
    items=("rows", "rows"),
    float32=("bias",),
    follows_autocast=False,
    # These are the widths of the MLPs of L/14 and H/14.
    shipped=(Shipped("N4096", RowShape(64, 4096), ("bf16", "fp32")), Shipped("N5120", RowShape(64, 5120))),
    # Both activation ops share these kernels. They are tuned for 256 images of L/14.
    targets=(
        Target("bias_act", RowShape(65792, 4096), Tunable.named(RowConfig, "bias_act_bwd", "bias_act_fwd", axes=TILES)),
    ),
)
QUICK_GELU = dataclasses.replace(
    GELU,
    op=bias_quick_gelu,
    reference=reference.bias_quick_gelu,
    shipped=(Shipped("N4096", RowShape(64, 4096)),),
    targets=(),
)
SPECS = (GELU, QUICK_GELU)
