"""The predicted time of every op and of training steps, from the model of the GPU: ``clipfast inspect --predict``.

A launch takes what the model says. A PyTorch op beside it takes the longer of two times, one for its FLOPs at the rate
of large products and one for its bytes at the rate of copies, and the overhead of a launch. Launches follow each other
without a gap, as in a CUDA graph: the host is left out.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfast.columns import align
from clipfast.kernels.hardware import CARDS
from clipfast.kernels.launch import Launch
from clipfast.kernels.spec import OpSpec, Shape, specs
from clipfast.ledger import Event
from clipfast.units import SECONDS, scaled

from .. import categories
from ..case import OURS, short
from .model import FULL, Effort, Machine, NoModel, Prediction, predict_launch
from .validation import Band, errors
from .workloads import Work, measured_shapes, op_work, step_work

# Pairs of a step of each published model, which fit into 80 GB; ``clipfast plan --fit`` finds the most that do.
STEPS = {
    "RN50": 256, "RN101": 256, "RN50x4": 128, "RN50x16": 64, "RN50x64": 32, "ViT-B-32": 1024, "ViT-B-16": 512,
    "ViT-L-14": 128, "ViT-L-14-336": 64, "ViT-H-14": 64, "ViT-g-14": 64, "ViT-bigG-14": 32,
}  # fmt: skip
# The kind of published kernels that stand for an op's, by the op's category.
KINDS = {
    "attention": ("attention forward", "attention backward"), "loss": ("loss",), "patch, text input": ("patch",),
    "norm, activation": ("norm forward", "norm backward"),
}  # fmt: skip
STEP = "step"


def error_band(kinds: Sequence[str]) -> Band | None:
    """Return the largest error on kinds of published kernels, or None if nothing is known of them."""
    found = [errors()[kind] for kind in kinds if kind in errors()]
    return max(found, key=lambda band: band.p90, default=None)


@dataclasses.dataclass(frozen=True)
class Part:
    """Equal launches of an op or a step."""

    kernel: str
    launches: int
    prediction: Prediction | None
    reason: str = ""  # why there is no prediction

    @property
    def seconds(self) -> float:
        """Return the time of all of them."""
        return self.launches * self.prediction.seconds if self.prediction else 0.0


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The predicted time of one op, forward and backward, or of one step.

    Attributes:
        name: of the op, or "step".
        shape: its sizes; of a step, the model and the number of pairs.
        dtype: name of the dtype.
        items: how many things one call handles.
        kinds: of the published kernels that its error is taken from; none for a step.
        parts: its launches.
        torch_ops: number of PyTorch ops beside them.
        torch_seconds: time of these without products.
        product_seconds: time of PyTorch's matrix products and convolutions.
        shares: the time by what it is spent on, one of the categories of a measured step.
    """

    name: str
    shape: dict[str, Any]
    dtype: str
    items: int
    kinds: tuple[str, ...]
    parts: tuple[Part, ...]
    torch_ops: int
    torch_seconds: float
    product_seconds: float
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Return the time of everything."""
        return sum(part.seconds for part in self.parts) + self.torch_seconds + self.product_seconds

    @property
    def band(self) -> Band | None:
        """Return the error of the model on published kernels of these kinds."""
        return error_band(self.kinds)


def forecast_op(number: int, dtype: str, machine: Machine, product_flops: float, effort: Effort = FULL) -> Forecast:
    """Predict op number ``number`` of :func:`measured_shapes` on a card.

    Args:
        number: of the op and its shape.
        dtype: name of the dtype.
        machine: the GPU.
        product_flops: FLOP/s of PyTorch's own matrix products.
        effort: how much the model runs.
    """
    return forecast_shape(*measured_shapes()[number], dtype, machine, product_flops, effort)


def forecast_shape(
    spec: OpSpec, shape: Shape, dtype: str, machine: Machine, product_flops: float, effort: Effort = FULL
) -> Forecast:
    """Predict an op at any shape; the other arguments are those of :func:`forecast_op`."""
    size, _ = spec.items
    work = op_work(spec, shape, dtype)
    kinds = KINDS.get(spec.category, ("memory",))
    return _forecast(
        work, machine, product_flops, effort, name=spec.name, shape=shape.to_dict(), dtype=dtype,
        items=getattr(shape, size), kinds=kinds,
    )  # fmt: skip


def forecast_step(model: str, machine: Machine, product_flops: float, effort: Effort = FULL) -> Forecast:
    """Predict one training step of a published model on one GPU, in bfloat16 with AdamW."""
    work = step_work(model, STEPS[model], CARDS[machine.name.lower()])
    shape = {"model": model, "batch": STEPS[model]}
    return _forecast(
        work, machine, product_flops, effort, name=STEP, shape=shape, dtype="bf16", items=STEPS[model], kinds=()
    )


def _forecast(work: Work, machine: Machine, product_flops: float, effort: Effort, **what: Any) -> Forecast:
    parts = predict_parts([launch for _, launch in work.launches], machine, effort)
    times = [max(op.flops / product_flops, op.bytes / machine.hbm_rate) + machine.launch for op in work.ops]
    products = sum(time for time, op in zip(times, work.ops, strict=True) if op.flops)
    return Forecast(
        **what, parts=parts, torch_ops=len(work.ops),
        torch_seconds=sum(times) - products, product_seconds=products, shares=_shares(parts, work.ops, times),
    )  # fmt: skip


def _shares(parts: Sequence[Part], ops: Sequence[Event], times: Sequence[float]) -> dict[str, float]:
    """Return seconds by category. The kernel of a launch has that of its op; of PyTorch's ops, the phase decides."""
    of_kernel = {kernel: spec.category for spec in specs().values() for kernel in spec.kernels}
    of_phase = {"update": categories.OPTIMIZER, "loss forward": categories.LOSS, "loss backward": categories.LOSS}
    found = dict.fromkeys(categories.CATEGORIES, 0.0)
    for part in parts:
        found[of_kernel.get(part.kernel, categories.OTHER)] += part.seconds
    for op, time in zip(ops, times, strict=True):
        found[categories.GEMM if op.flops else of_phase.get(op.phase, categories.COPIES)] += time
    return {category: seconds for category, seconds in found.items() if seconds}


def predict_parts(launches: Sequence[Launch], machine: Machine, effort: Effort = FULL) -> tuple[Part, ...]:
    """Predict launches; equal ones are predicted once."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(_key(launch), []).append(launch)
    return tuple(_part(same, machine, effort) for same in groups.values())


def _key(launch: Launch) -> str:
    """Return a key that is equal for launches that take equally long, wherever they stand in the matrix of logits."""
    args = {name: _size(value) for name, value in launch.args.items() if name != "offset"}
    return str((launch.kernel.__name__, launch.grid, args, launch.constexprs, launch.options))


def _size(value: Any) -> Any:
    tensor = getattr(value, "base", value)
    return (tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) if hasattr(tensor, "stride") else value


def _part(same: Sequence[Launch], machine: Machine, effort: Effort) -> Part:
    # of blocks in a row, one that is neither the first nor in the middle has no pairs, like most
    launch = same[len(same) // 3]
    try:
        return Part(launch.kernel.__name__, len(same), _predicted(launch, machine, effort))
    except NoModel as error:
        return Part(launch.kernel.__name__, len(same), None, str(error))


_predictions: dict[tuple[str, Machine, Effort], Prediction] = {}  # of this process, by the key of the launch


def _predicted(launch: Launch, machine: Machine, effort: Effort) -> Prediction:
    key = _key(launch), machine, effort
    if key not in _predictions:
        _predictions[key] = predict_launch(launch, machine, effort)
    return _predictions[key]


def heading(is_step: bool, measured: dict[str, float] | None = None) -> str:
    """Return the heading over the :func:`rows` of ops, or over those of steps."""
    return _aligned(is_step, [[*(_STEP_HEAD if is_step else _OP_HEAD), *_head(measured)]])


def rows(one: Forecast, measured: dict[str, float] | None = None) -> str:
    """Return the rows of a forecast; ``measured`` are seconds by :func:`label`."""
    if one.name != STEP:
        return _aligned(False, _op_rows(one, measured))
    parts = sorted(one.shares.items(), key=lambda share: -share[1])
    spent = ", ".join(f"{category} {seconds / one.seconds:.1%}" for category, seconds in parts)
    return "\n".join([_aligned(True, [_step_row(one, measured)]), *([f"  {spent}"] if spent else [])])


def label(name: str, shape: dict[str, Any], dtype: str) -> str:
    """Return op, sizes and dtype in one text."""
    return " ".join([name, *(f"{size}={value}" for size, value in shape.items()), dtype])


_OP_HEAD = ("op, forward and backward", "time", "error", "launches", "waves", "cycles", "limit")
_STEP_HEAD = ("step of", "pairs", "time", "pairs/s", "kernels", "products", "other ops")


def _aligned(is_step: bool, cells: Sequence[Sequence[str]]) -> str:
    widths = (14, 5, 7, 7, 7, 8, 9) if is_step else (58, 7, 5, 8, 6, 9, 18)
    return align(cells, right=range(1, 7 if is_step else 6), at_least=(*widths, 8))


def _op_rows(one: Forecast, measured: dict[str, float] | None) -> list[list[str]]:
    within = f"{math.expm1(one.band.p90):.0%}" if one.band else "?"
    found = [[label(one.name, one.shape, one.dtype), scaled(one.seconds, SECONDS), within, "", "", "", "",
              *_against(one, measured)]]  # fmt: skip
    for part in one.parts:
        found.append(["  " + part.kernel.strip("_").removesuffix("_kernel"), *_part_cells(part)])
    if one.torch_ops:
        spent = scaled(one.torch_seconds + one.product_seconds, SECONDS)
        found.append([f"  {one.torch_ops} PyTorch ops", spent])
    return [[*row, *[""] * (len(found[0]) - len(row))] for row in found]


def _part_cells(part: Part) -> list[str]:
    found = part.prediction
    if found is None:
        return ["", "", str(part.launches), "", "", f"not predicted: {part.reason}"]
    guesses = f", {found.guesses} branches guessed" if found.guesses else ""
    return [scaled(part.seconds, SECONDS), "", str(part.launches), f"{found.waves:.2f}", f"{found.cycles:.0f}",
            found.limit + guesses]  # fmt: skip


def _step_row(one: Forecast, measured: dict[str, float] | None) -> list[str]:
    return [
        one.shape["model"], str(one.items), scaled(one.seconds, SECONDS), f"{one.items / one.seconds:,.0f}",
        scaled(sum(part.seconds for part in one.parts), SECONDS), scaled(one.product_seconds, SECONDS),
        scaled(one.torch_seconds, SECONDS), *_against(one, measured),
    ]  # fmt: skip


def _head(measured: dict[str, float] | None) -> list[str]:
    return [] if measured is None else ["measured", "predicted / measured"]


def _against(one: Forecast, measured: dict[str, float] | None) -> list[str]:
    if measured is None:
        return []
    seconds = measured.get(label(one.name, one.shape, one.dtype))
    return ["-", ""] if seconds is None else [scaled(seconds, SECONDS), f"{one.seconds / seconds:.2f}"]


def measurements(paths: Iterable[str]) -> dict[str, float]:
    """Return the median seconds of our candidate by :func:`label`, from result files of ``clipfast bench``.

    Raises:
        ValueError: a file is not such a result.
    """
    found: dict[str, float] = {}
    for path in paths:
        try:
            cases = json.loads(Path(path).read_text())["cases"]
            for case in cases:
                ours: dict[str, Any] = next((one for one in case["candidates"] if one["name"] == OURS), {})
                if "median_s" in ours:
                    found[label(case["op"].removesuffix(".fwd_bwd"), case["shape"], case["dtype"])] = ours["median_s"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"--against {path} is not a result of clipfast bench: {short(error)}") from None
    return found


def to_json(one: Forecast) -> dict[str, Any]:
    """Return a forecast for JSON, with the figures that follow from it."""
    record = dataclasses.asdict(one) | {"seconds": one.seconds, "items_per_s": one.items / one.seconds}
    record["error"] = dataclasses.asdict(one.band) if one.band else None
    for part, fields in zip(one.parts, record["parts"], strict=True):
        if part.prediction:
            fields["prediction"]["limit"] = part.prediction.limit
    return record
