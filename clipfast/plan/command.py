"""Predict what a training step needs on every GPU: memory, FLOPs, bytes sent, kernels and time.

There is a row for each mode of distributed_contrastive_loss (on one GPU, for each value of contrastive_loss's memory=)
and one for OpenCLIP's ClipLoss(local_loss=True, gather_with_grad=True). With --model, the step is that of the model
under autocast, the loss, DistributedDataParallel and AdamW; without it, the loss alone. It runs on fake tensors, as
rank 0 of processes that are not there, so it needs neither a GPU nor memory.

With --train, it is a step of clipfast train with a model, under DDP or FSDP2: memory by what it is for, time, pairs/s,
and what a training of --samples-seen pairs takes. --fit says which batches fit on these GPUs, for many models at once.

These are predictions: no time was ever measured on a GPU. --check compares a step on fake tensors with a real one.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import Count, add_output
from ..columns import align
from ..files import replace_text
from ..units import BYTES, COUNTS, ONES, SECONDS, scaled
from . import training_command

if TYPE_CHECKING:
    from ..kernels.hardware import Cluster
    from .step import Problem

EPILOG = """\
examples:
  clipfast plan --pairs 32768 --gpus 256
  clipfast plan --pairs 32768 --gpus 64 --model ViT-L-14 --card h200 --largest
  clipfast plan --fit --gpus 8 --card h100               what fits: every model, DDP and FSDP2, each checkpointing
  clipfast plan --train --model ViT-L-14 --gpus 64 --parallel fsdp --ema --samples-seen 12.8e9 --price-per-gpu-hour 2.5
  clipfast plan --check --gpus 3                         runs three processes on this machine
  clipfast plan --check --train --model ViT-T-8-32       compares steps of DDP and FSDP2 on this machine

Figures are those of one rank, memory at its peak. Kernels and messages are counted as one rank starts them, messages by
ring algorithms. "exposed" is what messages add to the time of computing; "(auto)" is the mode that mode="auto" takes.
exit code: 0 printed, 1 --check found a figure wrong, 2 bad arguments"""
NOTE = "Predicted, never measured on a GPU: rates are published, and latencies are assumed unless you gave them."
PAIRS, GPUS = Count(1, 2**24), Count(1, 2**16)
# Options of the machine: the fields of Card or Cluster that each sets, their unit, and its help.
MACHINE = {
    "tflops": (("half_peak", "single_peak"), 1e12, "1e12 FLOPs per second that products reach"),
    "memory_gb": (("memory_bytes",), 1e9, "1e9 bytes that the step may take"),
    "link_gbs": (("link_bytes_per_s",), 1e9, "1e9 bytes per second that a GPU sends within its node"),
    "network_gbs": (("network_bytes_per_s",), 1e9, "1e9 bytes per second that a GPU sends to other nodes"),
    "gpus_per_node": (("gpus_per_node",), 1, "GPUs with fast links to each other (default: 8)"),
    "latency_us": (("latency_s",), 1e-6, "microseconds that a message takes (default: 5)"),
    "launch_us": (("launch_s",), 1e-6, "microseconds in which the host starts a kernel (default: 10)"),
}


def _number(*, or_zero: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
        if not (value > 0 or (or_zero and value == 0)):
            raise argparse.ArgumentTypeError(f"must be {'at least' if or_zero else 'more than'} 0, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def add_parser(commands: Any) -> None:
    """Add the subcommand. Values that need an import to be checked are checked when it runs."""
    parser = commands.add_parser(
        "plan", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=PAIRS, metavar="N", help="pairs of all GPUs (default: 32768; with --check 256 for each GPU)")
    add("--gpus", type=GPUS, metavar="W", help="GPUs that share the batch (default: 1; with --check 3)")
    add("--model", metavar="NAME", help="model that is trained; without it, the loss is planned alone")
    add("--embed-dim", type=Count(1, 2**16), metavar="D", help="size of the features without --model (default: 512)")
    add("--dtype", default="bf16", help="dtype of features and autocast: bf16, fp16 or fp32 (default: bf16)")
    add("--card", help="a100, h100, h200 or b200 (default: h100)")
    for name, (_, _, text) in MACHINE.items():
        kind = GPUS if name == "gpus_per_node" else _number(or_zero=name.endswith("_us"))
        add(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=text)
    add("--largest", action="store_true", help="also search the largest batch that fits, in minutes, up to 16384 a GPU")
    add("--check", action="store_true", help="run the step on this machine, and compare with the prediction")
    add_output(parser, "--json", help="also write everything to FILE")
    add("--traceback", action="store_true", help="show where an error was raised")
    training_command.add_arguments(parser, _number)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, or what the check found, and return the exit code."""
    training_command.check_arguments(args)
    if args.train or args.fit:
        return training_command.run(args, _cluster(args))
    from .predict import check, predict

    problem, cluster = _problem(args), _cluster(args)
    ranks = f"{problem.gpus} ranks of {problem.rows:,} pairs" if problem.gpus > 1 else "one rank"
    trained = f"a step of {problem.model}" if problem.model else "the loss alone"
    rounded = f" (rounded up from {problem.pairs:,})" if problem.pairs % problem.gpus else ""
    print(
        f"{problem.rows * problem.gpus:,} pairs{rounded}, D = {problem.embed_dim}, {args.dtype}; {ranks}; {trained}\n"
    )
    rows = check(problem) if args.check else predict(problem, cluster, searches=args.largest)
    (_print_check if args.check else _print_plan)(rows)
    if not args.check:
        print(f"\n{_basis(problem, cluster)}\n{NOTE}")
    if args.json is not None:
        size = dataclasses.asdict(problem) | {"dtype": args.dtype, "rows": problem.rows}
        plan = {"note": NOTE, "machine": dataclasses.asdict(cluster), "modes": rows}
        result = {"check": rows} if args.check else plan
        replace_text(args.json, json.dumps({"problem": size, **result}, indent=1) + "\n")
    return int(args.check and not all(row["agrees"] for row in rows))


def _problem(args: argparse.Namespace) -> "Problem":
    from ..kernels.dtypes import DTYPES
    from ..models import SigLIPConfig, get_model_config
    from .step import Problem

    gpus = args.gpus or (3 if args.check else 1)
    pairs = args.pairs or (256 * gpus if args.check else 32768)
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype: unknown {args.dtype!r}; known: {', '.join(DTYPES)}")
    for flag, value, most in (("gpus", gpus, 8), ("pairs", pairs, 16384)):
        if args.check and value > most:
            raise ValueError(f"--check runs every rank on this machine: --{flag} must be at most {most}, got {value}")
    if args.model is not None and args.embed_dim is not None:
        raise ValueError("--embed-dim is the model's own with --model: leave it out")
    config = None if args.model is None else get_model_config(args.model)
    if isinstance(config, SigLIPConfig):
        raise ValueError(
            f"--model {args.model} is trained with the sigmoid loss, and a plan is made for the contrastive loss only: "
            "take a CLIP model"
        )
    dim = (args.embed_dim or 512) if config is None else config.embed_dim
    return Problem(pairs, gpus, DTYPES[args.dtype], args.model, dim)


def _cluster(args: argparse.Namespace) -> "Cluster":
    from ..kernels.hardware import CARDS, Cluster

    given = [name for name in ("card", *MACHINE) if getattr(args, name) is not None]
    if args.check and given:
        raise ValueError(f"--{given[0].replace('_', '-')} has no effect with --check: leave it out")
    if args.card not in (None, *CARDS):
        raise ValueError(f"--card: unknown {args.card!r}; known: {', '.join(CARDS)}. For another, take the nearest of "
                         "these and give --tflops, --memory-gb, --link-gbs and --network-gbs")  # fmt: skip
    values = {name: getattr(args, name) * MACHINE[name][1] for name in given if name != "card"}
    fields = {field: value for name, value in values.items() for field in MACHINE[name][0]}
    if args.tflops is not None:  # this is what products reach
        fields |= {"half_reached": 1.0, "single_reached": 1.0}
    card = CARDS[args.card or "h100"]
    of_card = {name: fields.pop(name) for name in [*fields] if hasattr(card, name)}
    return Cluster(dataclasses.replace(card, **of_card), **fields)


def _basis(problem: "Problem", cluster: "Cluster") -> str:
    card = cluster.card
    gb, gb_per_s = card.memory_bytes / 1e9, card.memory_bytes_per_s / 1e9
    tflops = card.reached(half=problem.dtype.itemsize == 2) / 1e12
    rates = f"{tflops:g} TFLOP/s, {gb:g} GB of memory at {gb_per_s:g} GB/s"
    if problem.gpus > 1:
        collective, ring = (cluster.bytes_per_s(problem.gpus, is_ring=is_ring) / 1e9 for is_ring in (False, True))
        rates += f", {collective:g} GB/s that a rank sends in collectives and {ring:g} GB/s in a ring"
        rates += f", {cluster.latency_s * 1e6:g} us for a message"
    return f"taken for {card.name}: {rates}, {cluster.launch_s * 1e6:g} us of the host for a kernel."


def _print_plan(modes: list[dict[str, Any]]) -> None:
    names = [found["mode"] + " (auto)" * found["is_auto"] for found in modes]
    heads = [head for head in modes[0] if head not in ("mode", "is_auto") and not isinstance(modes[0][head], dict)]
    rows = [[name, *(_cell(head, found[head]) for head in heads)] for name, found in zip(names, modes, strict=True)]
    print(align([["mode", *heads], *rows], right=range(1, len(heads) + 1), indent="  "))
    for what in ("memory by category", "time by phase", "sent by collective"):
        parts = [", ".join(f"{part} {_cell(what, value)}" for part, value in found[what].items()) for found in modes]
        print(f"\n{what}\n" + align(list(zip(names, parts, strict=True)), indent="  "))


def _print_check(rows: list[dict[str, Any]]) -> None:
    heads = ["path", "mode", "what", "predicted", "measured"]
    cells = [[*(f"{row[head]:,}" if isinstance(row[head], int) else row[head] for head in heads),
              "" if row["agrees"] else "WRONG"] for row in rows]  # fmt: skip
    print(align([[*heads, ""], *cells], right=(3, 4), indent="  "))
    wrong = sum(not row["agrees"] for row in rows)
    print(f"\n{len(rows)} figures: {len(rows) - wrong} as predicted, {wrong} not.")


def _cell(name: str, value: Any) -> str:
    if name == "sent by collective":
        return f"{scaled(value['bytes'], BYTES)} in {value['messages']:,} messages"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if name.startswith(("memory", "sent")):
        return scaled(value, BYTES)
    return scaled(value, SECONDS) if isinstance(value, float) else scaled(value, COUNTS if name == "FLOPs" else ONES)
