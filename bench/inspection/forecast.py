"""The predicted time of every op and of training steps, from the model of the GPU: ``clipfast inspect --predict``.

An op or a step runs on fake tensors, without a GPU or memory. Each launch of our kernels takes the time that the model
predicts. Each PyTorch op between them takes the longer of two times, one for its FLOPs at the rate of large products
and one for its bytes at the rate of copies, and the overhead of a launch. Launches follow each other without a gap, as
in a CUDA graph. An eager call takes the time of the GPU or that of the host, whichever is longer; ``eager`` has the
time of the host.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.io.text import align
from clipfast.io.units import SECONDS, scaled
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES, CARDS, Card
from clipfast.kernels.launch import Launch, record_launches
from clipfast.kernels.spec import Draw, OpSpec, Shape, specs
from clipfast.plan.ledger import Event, Ledger
from clipfast.plan.planned_step import Setup, rank_of

from .. import categories
from .correction import FP8_PRODUCT, Corrected, corrected, kind_of
from .eager import STEP, binds_from, host_seconds
from .model import FULL, H100, Effort, Machine, NoModel, Prediction, predict_launch

# The pairs in a step of each published model. They fit into 80 GB; ``clipfast plan --fit`` finds the largest number.
STEPS = {
    "RN50": 256, "RN101": 256, "RN50x4": 128, "RN50x16": 64, "RN50x64": 32, "ViT-B-32": 1024, "ViT-B-16": 512,
    "ViT-L-14": 128, "ViT-L-14-336": 64, "ViT-H-14": 64, "ViT-g-14": 64, "ViT-bigG-14": 32,
}  # fmt: skip
GPU, HOST = "GPU", "host"


class Work(NamedTuple):
    """The launches and PyTorch ops of an op or a step, each in order."""

    launches: list[Launch]
    ops: list[Event]


class Recorder(Ledger):
    """A :class:`Ledger` that also keeps the launches of our kernels, by the index of their event in ``events``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernels: dict[int, Launch] = {}

    def book_launches(self) -> None:
        """Keep the recorded launches for the prediction, and add their events."""
        launches, before = [standing_in(launch) for launch in self.launches], len(self.events)
        super().book_launches()
        self.kernels |= dict(zip(range(before, len(self.events)), launches, strict=True))

    def begin(self) -> None:
        """Start a new record of launches, PyTorch ops and messages whose time is predicted."""
        super().begin()
        self.kernels.clear()

    @property
    def work(self) -> Work:
        """Return the launches, and apart from them the PyTorch ops."""
        ops = [event for number, event in enumerate(self.events) if number not in self.kernels]
        return Work([*self.kernels.values()], ops)


def op_work(spec: OpSpec, shape: Shape, dtype: str, arch: int = 90) -> Work:
    """Return the launches and PyTorch ops of an op's forward and backward pass at a shape, for a compute capability."""
    with (
        warnings.catch_warnings(action="ignore"),  # taking the address of a fake tensor gives a deprecation warning
        FakeTensorMode(allow_non_fake_inputs=True),
        record_launches(arch, ARCHITECTURES[arch].multiprocessors) as launches,
        Recorder(launches) as ledger,
    ):
        call = spec.call(shape, spec.bench_values, Draw(empty=True), DTYPES[dtype])
        for name, x in call.inputs.items():
            x.requires_grad_(bool(call.grads) and x.is_floating_point() and name not in spec.frozen)
        ledger.begin()
        results = spec.measured(**call.inputs, **call.options)
        ledger.book_launches()
        if call.grads:
            results = results if isinstance(results, tuple) else (results,)
            # The benchmark calls grad() too: backward() would copy a gradient that two leaves share, and models have no
            # such leaves.
            leaves = [x for x in call.inputs.values() if x.requires_grad]
            torch.autograd.grad(results, leaves, [torch.empty_like(result) for result in results], allow_unused=True)
            ledger.book_launches()
    return ledger.work


def step_work(model: str, pairs: int, card: Card = CARDS["h100"], *, captions: bool = False) -> Work:
    """Return the launches and PyTorch ops of a published model's training step in bfloat16 with AdamW on one GPU.

    With ``captions``, texts are packed and have the lengths of captions; otherwise they are as long as the context.
    """
    setup = Setup(model, gpus=1, captions=captions)
    with rank_of(setup, setup.config, card, ledger_type=Recorder) as rank:
        rank.optimizer.zero_grad()
        rank.step(pairs, is_whole=True)
    assert isinstance(rank.ledger, Recorder)
    return rank.ledger.work


def measured_shapes() -> list[tuple[OpSpec, Shape]]:
    """Return every op at the sizes whose times are predicted, which are benchmarked on a GPU."""
    return [(spec, shape) for spec in specs().values() for shape in spec.bench["cuda"]]


def standing_in(launch: Launch) -> Launch:
    """Return a copy of a launch whose tensors keep layout, dtype and alignment, but have no memory."""
    with _disable_current_modes():
        stand_in = functools.cache(_empty)
        return dataclasses.replace(
            launch, args={name: _replace(value, stand_in) for name, value in launch.args.items()}
        )


def _replace(value: Any, stand_in: Any) -> Any:
    """Replace the tensors in a launch's argument by tensors without memory; integers on the CPU keep their values."""
    if type(value) is Tensor and not value.is_floating_point() and value.device.type == "cpu":
        return value
    if isinstance(value, Tensor):
        return stand_in(
            value.untyped_storage()._cdata, tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
        )
    if isinstance(value, TensorDescriptor):
        return dataclasses.replace(value, base=_replace(value.base, stand_in))
    return value


def _empty(
    storage: int,  # noqa: ARG001  (part of the cache's key: tensors that share no memory get two results)
    shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return a tensor without memory as an argument of a launch whose time is predicted."""
    size = offset + 1 + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    return torch.empty(max(0, size), dtype=dtype, device="meta").as_strided(shape, stride, offset)


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of equal launches of an op or a step, which are predicted once."""

    kernel: str
    launches: int
    prediction: Prediction | None
    reason: str = ""  # why there is no prediction

    @property
    def seconds(self) -> float:
        """Return the predicted seconds of all launches in the group."""
        return self.launches * self.prediction.seconds if self.prediction else 0.0


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The predicted time of one op, forward and backward, or of one step.

    Attributes:
        name: the name of the op, or "step".
        shape: the sizes of the op; for a step, the model and the number of pairs.
        dtype: name of the dtype.
        items: the number of pairs, images or rows that one call handles.
        parts: the launches in groups of equal ones.
        torch_ops: the number of PyTorch ops in addition to the launches.
        torch_seconds: the time of the PyTorch ops, without matrix products and convolutions.
        product_seconds: time of PyTorch's matrix products and convolutions.
        host_seconds: the time that the host takes to start all launches and PyTorch ops.
        gpu_from: the smallest power of two of ``items`` from which the GPU takes longer than the host, if it was found.
        shares: the seconds by category, with the categories of a measured step.
        fp8_seconds: the part of ``product_seconds`` that products in 8 bits take.
    """

    name: str
    shape: dict[str, Any]
    dtype: str
    items: int
    parts: tuple[Part, ...]
    torch_ops: int
    torch_seconds: float
    product_seconds: float
    host_seconds: float
    gpu_from: int | None = None
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fp8_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the predicted GPU time of all kernel launches and PyTorch ops, in seconds."""
        return sum(part.seconds for part in self.parts) + self.torch_seconds + self.product_seconds

    @property
    def corrected(self) -> Corrected:
        """Return the predicted GPU time, corrected by the error of the model on published kernels."""
        kernels = [(kind_of(part.kernel, _category_of(part.kernel)), part.seconds) for part in self.parts]
        kernels.append((FP8_PRODUCT, self.fp8_seconds))
        return corrected(kernels, self.torch_seconds + self.product_seconds - self.fp8_seconds)

    @property
    def eager_seconds(self) -> float:
        """Return the predicted seconds of an eager call: the GPU's corrected time, or the host's if it is longer."""
        return max(self.corrected.seconds, self.host_seconds)

    @property
    def binds(self) -> str:
        """Return whether the GPU or the host is predicted to take longer."""
        return GPU if self.corrected.seconds >= self.host_seconds else HOST


def forecast(
    task: int | str, dtype: str, machine: Machine = H100, effort: Effort = FULL, *, finds_batch: bool = False,
    captions: bool = False,
) -> Forecast:  # fmt: skip
    """Predict the time of an op, forward and backward, or of a training step in bfloat16 with AdamW on one GPU.

    Args:
        task: number of the op and its shape in :func:`measured_shapes`, or name of the published model.
        dtype: name of the dtype of an op.
        machine: the GPU.
        effort: the limits on how much the model simulates.
        finds_batch: predict other batches too, to find the batch from which the GPU takes longer than the host.
        captions: the texts of a step are packed captions, of 18 tokens on average, in place of texts of the context's
            length.
    """

    @functools.cache
    def at(items: int) -> Forecast:
        """Predict the time of the op or the step with another batch."""
        if isinstance(task, int):
            spec, shape = measured_shapes()[task]
            shape = shape.changed(**{spec.items[0]: items})
            return forecast_shape(spec, shape, dtype, machine, effort)
        work = step_work(task, items, CARDS[machine.name.lower()], captions=captions)
        sizes: dict[str, Any] = {"model": task, "batch": items} | ({"captions": True} if captions else {})
        what = {"name": STEP, "shape": sizes, "dtype": "bf16", "items": items}
        return _forecast(work, machine, effort, **what)

    found = at(_items(*measured_shapes()[task]) if isinstance(task, int) else STEPS[task])
    if not finds_batch:
        return found
    start = round(found.items * found.host_seconds / found.corrected.seconds)
    return dataclasses.replace(found, gpu_from=binds_from(lambda items: at(items).binds == GPU, start))


def forecast_shape(spec: OpSpec, shape: Shape, dtype: str, machine: Machine = H100, effort: Effort = FULL) -> Forecast:
    """Predict the time of an op at any shape; the other arguments are those of :func:`forecast`."""
    return _forecast(
        op_work(spec, shape, dtype), machine, effort, name=spec.name, shape=shape.to_dict(), dtype=dtype,
        items=_items(spec, shape),
    )  # fmt: skip


def _items(spec: OpSpec, shape: Shape) -> int:
    """Return the number of pairs, images or rows that a call of an op handles."""
    count: int = getattr(shape, spec.items[0])
    return count


def _forecast(work: Work, machine: Machine, effort: Effort, **what: Any) -> Forecast:
    """Return the forecast of recorded launches and PyTorch ops; ``what`` are its name, shape, dtype and items."""
    parts = predict_parts(work.launches, machine, effort)
    times = [machine.op_seconds(op.flops, op.bytes) for op in work.ops]
    timed = [*zip(times, work.ops, strict=True)]
    products = sum(time for time, op in timed if op.flops)
    return Forecast(
        **what, parts=parts, torch_ops=len(work.ops), torch_seconds=sum(times) - products, product_seconds=products,
        fp8_seconds=sum(time for time, op in timed if op.is_fp8), shares=_shares(parts, work.ops, times),
        host_seconds=host_seconds(what["name"], what["shape"], len(work.launches) + len(work.ops)),
    )  # fmt: skip


def _shares(parts: Sequence[Part], ops: Sequence[Event], times: Sequence[float]) -> dict[str, float]:
    """Return predicted seconds by category. A launch has its op's category, and a PyTorch op its phase's category."""
    of_phase = {"update": categories.OPTIMIZER, "loss": categories.LOSS}
    found = dict.fromkeys(categories.CATEGORIES, 0.0)
    for part in parts:
        found[_category_of(part.kernel)] += part.seconds
    for op, time in zip(ops, times, strict=True):
        found[categories.GEMM if op.flops else of_phase.get(op.phase, categories.COPIES)] += time
    return {category: seconds for category, seconds in found.items() if seconds}


@functools.cache
def _category_of(kernel: str) -> str:
    """Return the category of the op to which a kernel belongs."""
    return next((spec.category for spec in specs().values() if kernel in spec.kernels), categories.OTHER)


def predict_parts(launches: Sequence[Launch], machine: Machine, effort: Effort = FULL) -> tuple[Part, ...]:
    """Predict the times of launches; equal ones are predicted once."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(key_of(launch), []).append(launch)
    return tuple(_part(same, machine, effort) for same in groups.values())


def key_of(launch: Launch) -> str:
    """Return a key that is equal for launches that take equally long, wherever they stand in the matrix of logits."""
    args = {name: _size(value) for name, value in launch.args.items() if name != "offset"}
    return str((launch.kernel.__name__, launch.grid, args, launch.constexprs, launch.options))


def _size(value: Any) -> Any:
    """Return the properties of an argument that a launch's time depends on: shape, strides and dtype, or the value."""
    tensor = getattr(value, "base", value)
    return (tuple(tensor.shape), tensor.stride(), str(tensor.dtype)) if hasattr(tensor, "stride") else value


def _part(same: Sequence[Launch], machine: Machine, effort: Effort) -> Part:
    """Predict the time of launches that take equally long, or say why no model covers them."""
    # If the launches compute blocks of logits, most blocks hold no pairs. The block after a third of all is neither the
    # first nor in the middle, so it is one without pairs.
    launch = same[len(same) // 3]
    name = launch.kernel.__name__
    try:
        return Part(name, len(same), predict_launch(launch, machine, effort))
    except NoModel as error:
        return Part(name, len(same), None, str(error))


_OP_HEAD = (
    "op, forward and backward", "model", "corrected (range)", "host", "binds", "launches", "waves", "cycles", "limit",
)  # fmt: skip
_STEP_HEAD = (
    "step of", "pairs", "model", "corrected (range)", "host", "binds", "pairs/s", "kernels", "products", "other ops",
)  # fmt: skip


def heading(is_step: bool, measured: dict[str, float] | None = None) -> str:
    """Return the heading of the table of predicted times, for the :func:`rows` of ops or of steps."""
    more = ("measured", "predicted / measured") if measured is not None else ()
    return _aligned(is_step, [[*(_STEP_HEAD if is_step else _OP_HEAD), *more]])


def rows(one: Forecast, measured: dict[str, float] | None = None) -> str:
    """Return the rows of a forecast in the table of predicted times; ``measured`` are seconds by :func:`label`."""
    seconds = (measured or {}).get(label(one.name, one.shape, one.dtype))
    # An op is measured as a CUDA graph, and a step is not.
    predicted = one.eager_seconds if one.name == STEP else one.corrected.seconds
    against = [scaled(seconds, SECONDS), f"{predicted / seconds:.2f}"] if seconds else []
    times = [scaled(one.seconds, SECONDS), str(one.corrected), scaled(one.host_seconds, SECONDS), one.binds]
    noun = "pairs" if one.name == STEP else specs()[one.name].items[1]
    turn = [f"  the GPU takes longer than the host from {one.gpu_from:,} {noun} on"] if one.gpu_from else []
    if one.name == STEP:
        kernels = sum(part.seconds for part in one.parts)
        spent = [scaled(value, SECONDS) for value in (kernels, one.product_seconds, one.torch_seconds)]
        row = [one.shape["model"], str(one.items), *times, f"{one.items / one.eager_seconds:,.0f}", *spent, *against]
        parts = sorted(one.shares.items(), key=lambda share: -share[1])
        shares = ", ".join(f"{category} {seconds / one.seconds:.1%}" for category, seconds in parts)
        return "\n".join([_aligned(True, [row]), f"  {shares}", *turn])
    found = [[label(one.name, one.shape, one.dtype), *times, *[""] * 4, *against]]
    for part in one.parts:
        cells = ["", "", "", "", str(part.launches), "", "", f"not predicted: {part.reason}"]
        if part.prediction is not None:
            known = part.prediction
            guesses = f", {known.guesses} branches guessed" if known.guesses else ""
            cells = [scaled(part.seconds, SECONDS), "", "", "", str(part.launches), f"{known.waves:.2f}"]
            cells += [f"{known.cycles:.0f}", f"{known.limit}{guesses}"]
        found.append(["  " + part.kernel.strip("_").removesuffix("_kernel"), *cells])
    if one.torch_ops:
        found.append([f"  {one.torch_ops} PyTorch ops", scaled(one.torch_seconds + one.product_seconds, SECONDS)])
    table = _aligned(False, [[*row, *[""] * (len(found[0]) - len(row))] for row in found])
    return "\n".join([table, *turn])


def _aligned(is_step: bool, cells: Sequence[Sequence[str]]) -> str:
    """Return the rows of the table of predicted times, aligned."""
    widths = (14, 5, 7, 26, 7, 5, 7, 7, 8, 9) if is_step else (58, 7, 26, 7, 5, 8, 6, 9, 18)
    return align(cells, right=range(1, 10 if is_step else 8), at_least=(*widths, 8))


def label(name: str, shape: dict[str, Any], dtype: str) -> str:
    """Return op, sizes and dtype as one string, by which predicted and measured times are matched."""
    return " ".join([name, *(f"{size}={value}" for size, value in shape.items()), dtype])


def to_json(one: Forecast) -> dict[str, Any]:
    """Return a forecast of times for JSON, with the numbers that are computed from its fields."""
    return dataclasses.asdict(one) | {
        "seconds": one.seconds, "eager_seconds": one.eager_seconds, "items_per_s": one.items / one.eager_seconds,
        "binds": one.binds, "corrected": one.corrected._asdict(),
    }  # fmt: skip
