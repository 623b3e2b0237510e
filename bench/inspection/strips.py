"""Predicted steps of the loss of all ranks in each of its modes: the kernels and the messages of one rank.

    python -m clipfast.bench.inspection.strips                            the table of docs/predicted.md
    python -m clipfast.bench.inspection.strips --rows 1024 --gpus 32 --widths 512 --parts

A rank computes a strip of the logits, its b pairs against all N. The step runs on fake tensors, as the last rank of a
group that sends nothing. Our kernels take the time that the model of the GPU predicts. Other PyTorch ops take
the time of their bytes and of a launch, and messages the time by the table of hardware (``kernels/hardware.py``). A
message takes no time of the GPU, so it adds nothing to the step while kernels run that do not wait for it. The host's
time is not counted: in a training step, the host runs ahead of the GPU while the towers run.
"""

import dataclasses
import functools
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

from clipfast.cli.arguments import Count, Parser
from clipfast.kernels.contrastive.modes import MODES, choose_mode
from clipfast.kernels.contrastive.spec import STRIPS
from clipfast.kernels.hardware import CARDS, Cluster
from clipfast.kernels.launch import Launch
from clipfast.plan.loss import seconds, wire_seconds
from clipfast.plan.planned_step import Problem, run_loss

from . import offline
from .correction import Corrected, corrected, kind_of
from .forecast import Recorder, key_of
from .model import H100, QUICK, predict_launch

NODES = Cluster(CARDS["h100"], launch_s=0.0)  # the host starts kernels and messages before the GPU needs them
GPUS = (8, 64)
PRODUCTS = ("_stats_kernel", "_grad_tile_kernel", "_products_kernel", "_strip_products_kernel")
FLOPS = {"gather": 8, "ring": 8, "scalars": 12}  # per image of a rank, text of all ranks, and dimension


@dataclasses.dataclass(frozen=True)
class StripForecast:
    """The predicted step of the loss of all ranks on one of them, forward and backward; times are in seconds.

    Attributes:
        kernels: the time of our kernels, by name.
        torch_seconds: the time of the other PyTorch ops.
        floor: the time of the products at the rate that the power allows.
        wire: the time that messages take.
        sent: the bytes that the rank sends, by collective.
        total: the time from the first kernel or message to the last.
    """

    kernels: dict[str, float]
    torch_seconds: float
    floor: float
    wire: float
    sent: dict[str, int]
    total: float

    @property
    def gpu(self) -> float:
        """Return the time of all kernels and PyTorch ops of a strip."""
        return sum(self.kernels.values()) + self.torch_seconds

    @property
    def products(self) -> float:
        """Return the time of those kernels of a strip that multiply."""
        return sum(self.kernels.get(name, 0.0) for name in PRODUCTS)

    @property
    def corrected(self) -> Corrected:
        """Return the time of the step, corrected by the error of the model on published kernels."""
        kernels = [(kind_of(name, "loss"), took) for name, took in self.kernels.items()]
        return corrected(kernels, self.total - sum(self.kernels.values()))


def forecast_strip(rows: int, gpus: int, embed_dim: int, mode: str) -> StripForecast:
    """Predict a step of the loss of ``gpus`` ranks, each with ``rows`` pairs in bfloat16, on an H100."""
    problem = Problem(rows * gpus, gpus, torch.bfloat16, embed_dim)
    ledger = run_loss(problem, mode, NODES.card, rank=gpus - 1, ledger_type=Recorder)
    assert isinstance(ledger, Recorder)
    took: dict[int, float] = {}
    kernels: dict[str, float] = defaultdict(float)
    sent = Counter[str]()
    torch_seconds = wire = 0.0
    for number, event in enumerate(ledger.events):
        launch = ledger.kernels.get(number)
        if launch is not None:
            took[number] = _seconds(launch)
            kernels[launch.kernel.__name__] += took[number]
        elif event.collective:
            wire += wire_seconds(event, NODES, gpus)
            sent[event.collective] += event.bytes
        else:
            took[number] = H100.op_seconds(event.flops, event.bytes)
            torch_seconds += took[number]
    total = sum(seconds(ledger.events, NODES, gpus, took=took).values())
    floor = FLOPS[mode] * rows * rows * gpus * embed_dim / H100.power_flops
    return StripForecast(dict(kernels), torch_seconds, floor, wire, dict(sent), total)


_known: dict[str, float] = {}


def _seconds(launch: Launch) -> float:
    """Return the predicted seconds of a launch of a strip. Equal ones are predicted once."""
    key = key_of(launch)
    if key not in _known:
        _known[key] = predict_launch(launch, H100, QUICK).seconds
    return _known[key]


def _row(size: tuple[int, int], widths: Sequence[int], *, has_parts: bool) -> str:
    """Return the row of the table for the pairs of a rank and the number of ranks."""
    rows, gpus = size
    cells, parts = [], []
    for width in widths:
        found = {mode: forecast_strip(rows, gpus, width, mode) for mode in MODES}
        chosen = choose_mode([rows] * gpus, width, torch.bfloat16)
        best = found[chosen]
        times = " / ".join(f"**{_ms(one.total)}**" if mode == chosen else _ms(one.total) for mode, one in found.items())
        wrong = "" if best.total == min(one.total for one in found.values()) else " (not the fastest)"
        cells.append(f"{times} ms{wrong}; {_ms(best.corrected.seconds)}; {best.floor / best.products:.0%}, "
                     f"{best.floor / best.gpu:.0%}")  # fmt: skip
        for mode, one in found.items():
            kernels = ", ".join(f"{name.strip('_')} {1e6 * took:.0f}" for name, took in one.kernels.items())
            sent = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in one.sent.items() if count)
            parts.append(f"  {rows} x {rows * gpus} D {width} {mode}: total {1e6 * one.total:.0f} us, floor "
                         f"{1e6 * one.floor:.0f}; {kernels}, other ops {1e6 * one.torch_seconds:.0f}; wire "
                         f"{1e6 * one.wire:.0f}, {1e6 * (one.total - one.gpu):.0f} not hidden: {sent}")  # fmt: skip
    return "\n".join([f"| {rows:,} | {rows * gpus:,} | {gpus} | {' | '.join(cells)} |", *parts * has_parts])


def _ms(took: float) -> str:
    """Return a predicted time of a strip in milliseconds, with three digits."""
    return f"{1e3 * took:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of predicted steps of the loss of all ranks."""
    parser = Parser(description=__doc__)
    add, of_rows = parser.add_argument, {strip.rows: strip.pairs // strip.rows for strip in STRIPS}
    widths = sorted({strip.embed_dim for strip in STRIPS})
    add("--rows", type=int, nargs="+", default=tuple(of_rows), metavar="B", help="pairs of a GPU")
    add("--gpus", type=int, nargs="+", metavar="W", help="numbers of GPUs (default: 8, 64 and that of the strip)")
    add("--widths", type=int, nargs="+", default=widths, metavar="D", help="widths of the features")
    add("--parts", action="store_true", help="print the parts of each time too")
    add("--jobs", type=Count(1, 1024), metavar="N", help="number of processes (default: one for each core)")
    args = parser.parse_args(arguments)
    sizes = [(rows, gpus) for rows in args.rows for gpus in args.gpus or sorted({*GPUS, of_rows.get(rows, GPUS[0])})]
    print(f"| pairs of a GPU | all pairs | GPUs | {' | '.join(f'D = {width}' for width in args.widths)} |")
    print("|" + " --- |" * (3 + len(args.widths)))
    for text in offline.spread(functools.partial(_row, widths=args.widths, has_parts=args.parts), sizes, args.jobs):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
