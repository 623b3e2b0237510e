"""The specifications of the ops for rows in 8 bits: sizes, inputs, cases, floors, and the calls that are compiled.

Checks compare the rows as numbers (``dense``), which rounding to 8 bits changes by up to 2^-4 of each. Errors are those
against unrounded rows in float64, so an op must round as well as its reference does.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..activation import spec as activation
from ..fp8_rows import Fp8Rows
from ..layer_norm import spec as norm_spec
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, RowShape, Shape, Shipped, on
from .linear import fp8_linear
from .norm import layer_norm_fp8
from .op import bias_gelu_fp8, bias_quick_gelu_fp8, quantize_rows, quantize_weight

Function = Callable[..., Any]


def dense(op: Function, *, differentiable: bool = True) -> Function:
    """Return ``op`` with its rows in 8 bits converted to numbers, which have a gradient if ``differentiable``."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        """Call the op and widen the rows that it returns."""
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return _each(op(*args, **kwargs), Fp8Rows.dequantize)

    return call


def timed(op: Function) -> Function:
    """Return an op that returns the carriers of its rows in 8 bits, so that nothing but the op takes time."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        """Call the op and return the carriers of the rows that it returns."""
        return _each(op(*args, **kwargs), lambda rows: rows.scale if rows.carrier is None else rows.carrier)

    return call


def _each(results: Any, convert: Callable[[Fp8Rows], Tensor]) -> Any:
    """Return an op's results with each of its rows in 8 bits converted to a tensor."""
    if isinstance(results, Tensor):
        return results
    if isinstance(results, Fp8Rows):
        return convert(results)
    return tuple(x if isinstance(x, Tensor) else convert(x) for x in results)


@dataclasses.dataclass(frozen=True)
class LinearShape(Shape):
    """Rows [rows, width] and a weight [features, width], with or without a bias; ``full`` is the recipe.

    ``then`` names the op in 8 bits that takes the output, and whose backward pass rounds the gradient for the layer.
    """

    rows: int
    width: int
    features: int
    bias: bool = False
    full: bool = False
    then: str = ""

    @property
    def elements(self) -> int:
        """Return the number of elements of the larger one of the input and the output of ``fp8_linear``."""
        return self.rows * max(self.width, self.features)


def make_rows(shape: RowShape, values: str, draw: Draw) -> Call:
    """Make the rows of a case of ``quantize_rows``."""
    return Call({"x": norm_spec.rows_of(shape, values, draw)})


def make_weight(shape: RowShape, values: str, draw: Draw) -> Call:
    """Make the weight of a case of ``quantize_weight``."""
    return Call({"weight": norm_spec.rows_of(shape, values, draw)})


def make_linear(shape: LinearShape, values: str, draw: Draw) -> Call:
    """Make the input, the weight, the bias and the upstream gradient of ``fp8_linear``."""
    x = norm_spec.rows_of(RowShape(shape.rows, shape.width), values, draw)
    inputs = {"x": x, "weight": shape.width**-0.5 * draw.normal(shape.features, shape.width)}
    if shape.bias:
        inputs["bias"] = draw.normal(shape.features)
    if shape.then:
        inputs["bias_after"] = draw.normal(shape.features)
    if shape.then == "layer_norm_fp8":
        inputs["weight_after"], inputs["residual"] = (
            draw.normal(shape.features),
            draw.normal(shape.rows, shape.features),
        )
    options = ({"recipe": "full"} if shape.full else {}) | ({"then": shape.then} if shape.then else {})
    results = 2 if "residual" in inputs else 1
    return Call(inputs, tuple(draw.normal(shape.rows, shape.features) for _ in range(results)), options)


def linear_of(ops: Any) -> Function:
    """Return the function that calls ``ops.fp8_linear``, and then the op of ``ops`` named ``then`` on its output."""

    @functools.wraps(fp8_linear)
    def call(
        *args: Any, then: str = "", bias_after: Any = None, weight_after: Any = None, residual: Any = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Call the linear layer in 8 bits, and the op that takes its output."""
        y = ops.fp8_linear(*args, **kwargs)
        if residual is not None:
            rows, stream = ops.layer_norm_fp8(y, weight_after, bias_after, residual=residual)
            return rows.dequantize(), stream
        return getattr(ops, then)(y, bias_after).dequantize() if then else y

    return call


def rows_floor(shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of ``quantize_rows``, which has no backward pass of its own."""
    return Floor(0, 0) if backward else Floor(4 * shape.elements, shape.elements * (itemsize + 1) + 4 * shape.rows)


def weight_floor(shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of ``quantize_weight``, as if its second read of the weight came from a cache."""
    if backward:
        return Floor(0, 0)
    return Floor(8 * shape.elements, shape.elements * (itemsize + 2) + 4 * (shape.rows + shape.width))


def norm_floor(shape: norm_spec.NormShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of ``layer_norm_fp8``, whose backward pass is that of ``layer_norm``."""
    return _narrower(norm_spec.floor(shape, itemsize, backward), shape, itemsize, backward)


def activation_floor(shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of ``bias_gelu_fp8``, whose backward pass is that of ``bias_gelu``."""
    return _narrower(activation.floor(shape, itemsize, backward), shape, itemsize, backward)


def _narrower(floor: Floor, shape: RowShape, itemsize: int, backward: bool) -> Floor:
    """Return the floor of an op with its result in 8 bits and a scale for each row; ``floor`` is that in 16 bits."""
    return floor if backward else floor + Floor(0, (1 - itemsize) * shape.elements + 4 * shape.rows)


def linear_floor(shape: LinearShape, itemsize: int, backward: bool) -> Floor:
    """Count the products of ``fp8_linear``, and the bytes of its operands, of which the input is kept in 8 bits."""
    x, y, weight = shape.rows * shape.width, shape.rows * shape.features, shape.width * shape.features
    if backward:
        return Floor(4 * shape.rows * weight, x + y * itemsize + x * itemsize + weight + 4 * weight)
    return Floor(2 * shape.rows * weight, x * itemsize + 4 * weight + y * itemsize)


def cases(sized: Callable[[int, int], Any], *, widest: int) -> list[Case]:
    """Return the cases of an op that rounds rows to 8 bits; ``sized`` makes its shape from rows and width."""
    return [
        Case(sized(37, 3), "three numbers a row", draws=norm_spec.FEW),
        Case(sized(67, 77), "odd rows and an odd width", quick=True, sanitize=True),
        Case(sized(9, 1000), "no power of two"),
        Case(sized(3, widest), "the widest"),
        Case(sized(1, 24), "one row", sanitize=True),
        Case(sized(1033, 24), "many tiles for each program, the last one short"),
        Case(sized(0, 64), "no rows"),
        Case(sized(65792, 1024), "L/14, a batch", on(CUDA)),
        *Case.layouts(sized(67, 40)),
        Case.extreme(sized(33, 72), "large", "values of thousands", quick=True),
        Case.extreme(sized(9, 768), "outlier", "one number of hundreds, next to which the others are small"),
        *Case.repeats(sized(517, 96), sized(65792, 1024)),
    ]  # fmt: skip


TOWERS = {device: norm_spec.towers(device, RowShape) for device in norm_spec.IMAGES}
QUANTIZE = OpSpec(
    op=dense(quantize_rows, differentiable=False),
    timed=timed(quantize_rows),
    reference=dense(reference.quantize_rows, differentiable=False),
    make=make_rows,
    cases=cases(RowShape, widest=16384),
    small=(RowShape(10, 12),),
    category="copies, elementwise",
    kernels=("_quantize_rows_kernel",),
    floor=rows_floor,
    bench=TOWERS,
    items=("rows", "rows"),
    follows_autocast=False,
    needs_fp8=True,
    shipped=(
        *(Shipped(f"N{width}", RowShape(64, width), ("bf16", "fp32")) for width in (1024, 4096)),
        Shipped("N16384", RowShape(64, 16384)),
    ),
)
WEIGHT = dataclasses.replace(
    QUANTIZE,
    op=dense(quantize_weight, differentiable=False),
    timed=timed(quantize_weight),
    reference=dense(reference.quantize_weight, differentiable=False),
    make=make_weight,
    torch_op="quantize_both",
    kernels=("_maxima_kernel", "_quantize_both_kernel"),
    floor=weight_floor,
    bench={device: (RowShape(4096, 1024), RowShape(5120, 1280)) for device in TOWERS},
    shipped=(Shipped("N4096 K1024", RowShape(4096, 1024), ("bf16", "fp32")),),
)
NORM = dataclasses.replace(
    norm_spec.SPECS[0],
    op=dense(layer_norm_fp8),
    timed=timed(layer_norm_fp8),
    reference=dense(reference.layer_norm_fp8),
    cases=[*cases(norm_spec.NormShape, widest=8192), *cases(norm_spec.after_residual, widest=8192)],
    floor=norm_floor,
    needs_fp8=True,
    shipped=tuple(
        Shipped(f"residual N{width}", norm_spec.after_residual(64, width)) for width in (768, 1024, 1280, 8192)
    ),
    targets=(),
)  # fmt: skip
GELU = dataclasses.replace(
    activation.GELU,
    op=dense(bias_gelu_fp8),
    timed=timed(bias_gelu_fp8),
    reference=dense(reference.bias_gelu_fp8),
    cases=[*cases(RowShape, widest=16384), Case.extreme(RowShape(67, 40), "range", "both tails, and all between", quick=True)],
    torch_op="bias_act_fp8",
    kernels=("_bias_act_fp8_fwd_kernel",),
    make=lambda shape, values, draw: activation.make(shape, "" if values == "outlier" else values, draw),
    floor=activation_floor,
    needs_fp8=True,
    targets=(),
)  # fmt: skip
QUICK_GELU = dataclasses.replace(
    GELU,
    op=dense(bias_quick_gelu_fp8),
    timed=timed(bias_quick_gelu_fp8),
    reference=dense(reference.bias_quick_gelu_fp8),
    shipped=(Shipped("N4096", RowShape(64, 4096)),),
)
LINEAR = OpSpec(
    op=linear_of(sys.modules[__name__]),
    reference=linear_of(reference),
    make=make_linear,
    cases=[
        Case(LinearShape(37, 3, 5), "a few numbers", draws=norm_spec.FEW),
        Case(LinearShape(67, 77, 41, bias=True), "odd sizes", quick=True, sanitize=True),
        Case(LinearShape(67, 77, 41, full=True), "odd sizes, all products in 8 bits", quick=True, sanitize=True),
        *(
            Case(LinearShape(67, 24, 77, then=op), "a gradient that comes in 8 bits as well", sanitize=True)
            for op in ("bias_gelu_fp8", "bias_quick_gelu_fp8", "layer_norm_fp8")
        ),
        Case(LinearShape(1, 24, 8, bias=True), "one row"),
        Case(LinearShape(0, 64, 8), "no rows"),
        Case(LinearShape(200, 768, 256, bias=True), "B/32's width", NOT_INTERPRETED),
        Case(LinearShape(200, 768, 256, full=True), "B/32's width, all products in 8 bits", NOT_INTERPRETED),
        Case(LinearShape(65792, 1024, 4096), "L/14, a batch", on(CUDA)),
        *Case.layouts(LinearShape(67, 40, 24)),
        Case.extreme(LinearShape(33, 72, 16), "large", "values of thousands", quick=True),
        *Case.repeats(LinearShape(517, 96, 48), LinearShape(65792, 1024, 4096)),
    ],
    small=(LinearShape(10, 16, 12, bias=True), LinearShape(10, 16, 12, full=True)),
    category="GEMM",
    kernels=("_dequantize_rows_kernel",),
    floor=linear_floor,
    bench={
        device: (LinearShape(images * 257, 1024, 4096), LinearShape(images * 257, 1024, 4096, full=True))
        for device, images in norm_spec.IMAGES.items()
    },
    items=("rows", "rows"),
    float32=("weight", "bias", "weight_after", "bias_after"),
    needs_fp8=True,
    shipped=(
        Shipped("K1024 N4096", LinearShape(64, 1024, 4096)),
        Shipped("K1024 N4096 full", LinearShape(64, 1024, 4096, full=True)),
        *(
            Shipped(f"K{width} N{4 * width} gelu", LinearShape(64, width, 4 * width, then="bias_gelu_fp8"))
            for width in (1024, 1280)
        ),
        Shipped("K1024 N4096 quick_gelu", LinearShape(64, 1024, 4096, then="bias_quick_gelu_fp8")),
        *(
            Shipped(f"K{width} N{width} norm", LinearShape(64, width, width, then="layer_norm_fp8"))
            for width in (768, 1024, 1280)
        ),
    ),
)  # fmt: skip
SPECS = (QUANTIZE, WEIGHT, NORM, GELU, QUICK_GELU, LINEAR)
