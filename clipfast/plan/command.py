"""``clipfast plan``: its arguments, and what it prints."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Row
    from .formulas import Problem
    from .machine import Machine

DESCRIPTION = """\
Predict what the contrastive loss of a large batch needs on every GPU: memory, FLOPs, bytes sent, and time, for each
mode of distributed_contrastive_loss (on one GPU, for each value of contrastive_loss's memory=), and for OpenCLIP's
ClipLoss(local_loss=True, gather_with_grad=True). The mode that "auto" takes is marked.

These are predictions, from formulas and published rates: no time was ever measured on a GPU. --check holds the
formulas of memory, FLOPs and bytes to what a run on this machine really allocates, multiplies and sends."""

EPILOG = """\
examples:
  clipfast plan --pairs 32768 --embed-dim 512 --gpus 256
  clipfast plan --pairs 1048576 --gpus 64 --card h200 --memory-gb 20     of which the towers leave 20 GB
  clipfast plan --pairs 65536 --gpus 32 --network-gbs 12.5               100 Gbit/s a GPU
  clipfast plan --check --gpus 3                                         measured here, on three gloo processes

memory is beyond the features of the rank, at its peak; sent is per rank; exposed is what messages add to the time of
computing; max pairs is the largest batch of all GPUs that fits, with its features, in what --memory-gb leaves.
exit code: 0 printed, 1 --check found a formula wrong, 2 bad arguments"""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PREDICTED = (
    "Predicted, never measured on a GPU: rates are published figures and latencies assumed, where none were given."
)


def add_parser(commands: Any) -> None:
    """Add the subcommand. Values are checked when it runs, so that ``--help`` imports nothing."""
    parser = commands.add_parser(
        "plan",
        help="predict memory, FLOPs, traffic and time of the loss on many GPUs",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=int, metavar="N", help="of all GPUs (default: 32768; with --check 512 a process)"
    )
    parser.add_argument("--embed-dim", type=int, default=512, metavar="D", help="of the features (default: 512)")
    parser.add_argument("--gpus", type=int, metavar="W", help="that share the batch (default: 1; with --check 3)")
    parser.add_argument("--dtype", default="bf16", help="of the features: bf16, fp16 or fp32 (default: bf16)")
    machine = parser.add_argument_group("machine", "published rates of the card, or what you know better")
    machine.add_argument("--card", help="a100, h100, h200 or b200 (default: h100)")
    machine.add_argument("--tflops", type=float, help="1e12 FLOPs per second that products reach")
    machine.add_argument("--memory-gb", type=float, metavar="GB", help="for the loss and its features (default: all)")
    machine.add_argument("--link-gbs", type=float, metavar="GB/S", help="that a GPU sends to others of its node")
    machine.add_argument("--network-gbs", type=float, metavar="GB/S", help="that a GPU sends to other nodes")
    machine.add_argument("--gpus-per-node", type=int, metavar="GPUS", help="(default: 8)")
    machine.add_argument("--latency-us", type=float, metavar="US", help="of a message (default: 5)")
    machine.add_argument("--launch-us", type=float, metavar="US", help="of the host, for a kernel (default: 10)")
    parser.add_argument("--check", action="store_true", help="measure on this machine, and compare with the formulas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or what the check found, and return the exit code."""
    import torch

    from .formulas import Problem
    from .machine import Machine

    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype: unknown {args.dtype!r}; known: {', '.join(DTYPES)}")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ValueError(f"no folder {args.json.parent} to write {args.json.name} in")
    gpus = args.gpus if args.gpus is not None else 3 if args.check else 1
    pairs = args.pairs if args.pairs is not None else 512 * max(gpus, 1) if args.check else 32768
    problem = Problem(pairs, args.embed_dim, gpus, getattr(torch, DTYPES[args.dtype]))
    fields = [field.name for field in dataclasses.fields(Machine)]
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    if args.check:
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')} has no effect with --check: leave it out")
        return _check(problem, args.json)
    return _plan(problem, Machine(**given), args.json)


def _plan(problem: "Problem", machine: "Machine", path: Path | None) -> int:
    from .predict import predict_all
    from .table import plan_table

    predictions = predict_all(problem, machine)
    print(plan_table(problem, machine, predictions))
    print(PREDICTED)
    if path is not None:
        _write(path, problem, {"machine": _machine(machine, problem), "modes": [p.to_dict() for p in predictions]})
    return 0


def _check(problem: "Problem", path: Path | None) -> int:
    from .check import check
    from .table import check_table

    rows = check(problem)
    print(check_table(problem, rows))
    if path is not None:
        _write(path, problem, {"check": [_row(row) for row in rows]})
    return 0 if all(row.agrees for row in rows) else 1


def _row(row: "Row") -> dict[str, Any]:
    return dataclasses.asdict(row) | {"ratio": row.ratio, "agrees": row.agrees}


def _machine(machine: "Machine", problem: "Problem") -> dict[str, Any]:
    rates = {
        "flops_per_s": machine.flops_per_s(problem.dtype),
        "memory_bytes": machine.memory_bytes,
        "collective_bytes_per_s": machine.wire_bytes_per_s(problem.gpus, ring=False),
        "ring_bytes_per_s": machine.wire_bytes_per_s(problem.gpus, ring=True),
    }
    return dataclasses.asdict(machine) | rates


def _write(path: Path, problem: "Problem", found: dict[str, Any]) -> None:
    size = {"pairs": problem.total, "rows": problem.rows, "embed_dim": problem.embed_dim, "gpus": problem.gpus}
    shape = {**size, "dtype": str(problem.dtype).removeprefix("torch.")}
    path.write_text(json.dumps({"note": PREDICTED, "problem": shape, **found}, indent=1) + "\n")
