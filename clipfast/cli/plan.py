"""Predict what a training needs on every GPU: memory, FLOPs, bytes sent, kernels and time.

With --train, the plan is of a step of clipfast train with a model, under DDP or FSDP2: memory by category, time,
pairs/s, and the length of a training of --samples-seen pairs. --fit says which batches fit on these GPUs, for many
models at once. Without both, the plan is of the loss alone: a row for each mode of distributed_contrastive_loss (on one
GPU, for each value of contrastive_loss's memory=), and one for OpenCLIP's ClipLoss(local_loss=True,
gather_with_grad=True).

The step runs on fake tensors, as rank 0 of processes that are not there, so it needs neither a GPU nor memory. These
are predictions: no time was ever measured on a GPU.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import replace_text
from ..io.text import align
from ..io.units import BYTES, COUNTS, ONES, SECONDS, scaled
from .arguments import BATCH, COUNT, Count, add_output

if TYPE_CHECKING:
    from ..kernels.hardware import Cluster
    from ..plan.fit import Assumptions
    from ..plan.planned_step import Problem, Setup

EPILOG = """\
examples:
  clipfast plan --pairs 32768 --gpus 256
  clipfast plan --fit --gpus 8 --card h100               what fits: every model, DDP and FSDP2, each checkpointing
  clipfast plan --train --model ViT-L-14 --gpus 64 --parallel fsdp --ema --samples-seen 12.8e9 --price-per-gpu-hour 2.5

Figures are those of one rank, memory at its peak. Kernels and messages are counted as one rank starts them, messages by
ring algorithms. "exposed" is the time that messages add to computing; "(auto)" is the mode that mode="auto" chooses.
exit code: 0 printed, 2 bad arguments"""
NOTE = "Predicted, never measured on a GPU: rates are published, and latencies are assumed unless you gave them."
TRAINING_NOTE = """\
Predicted, never measured on a GPU. Counted on fake tensors: activations, gathered weights, scratch, weights, optimizer,
FLOPs, kernels. Assumed: published rates of the card, reached by every kernel that is large; latencies; CUDA, NCCL and
allocator as marked; messages and kernels that do not slow each other down; no wait for data, evaluation or checkpoints.
The kernels of attention and of the loss are slower than that (docs/predicted.md), so take times as lower limits."""
PAIRS, GPUS = Count(1, 2**24), Count(1, 2**16)
# Maps an option that describes the machine to the fields of Card or Cluster that it sets, the factor from the option's
# unit to theirs, and the text for --help.
MACHINE = {
    "tflops": (("half_peak", "single_peak"), 1e12, "1e12 FLOPs per second that products reach"),
    "memory_gb": (("memory_bytes",), 1e9, "1e9 bytes that the step may take"),
    "link_gbs": (("link_bytes_per_s",), 1e9, "1e9 bytes per second that a GPU sends within its node"),
    "network_gbs": (("network_bytes_per_s",), 1e9, "1e9 bytes per second that a GPU sends to other nodes"),
    "gpus_per_node": (("gpus_per_node",), 1, "GPUs with fast links to each other (default: 8)"),
    "latency_us": (
        ("latency_s", "short_latency_s"),
        1e-6,
        "microseconds that a message takes (default: 5; short ones 1)",
    ),
    "launch_us": (("launch_s",), 1e-6, "microseconds in which the host starts a kernel (default: 10)"),
}
# The three kinds of plan. PLANS has the options that only some kinds take, and the kinds that take each.
TRAIN, FIT, OF_LOSS = "--train", "--fit", "a plan of the loss"
PLANS: dict[str, tuple[str, ...]] = {"pairs": (TRAIN, OF_LOSS), "batch_size": (TRAIN,)}
PLANS |= dict.fromkeys(("dtype", "embed_dim"), (OF_LOSS,))
PLANS |= dict.fromkeys(
    ("model", "parallel", "checkpointing", "accumulation", "precision", "fp8_recipe", "opt", "ema", "no_reshard",
     "captions", "samples_seen", "price_per_gpu_hour", "context_gb", "slack"), (TRAIN, FIT),
)  # fmt: skip


def _number(*, or_zero: bool = False) -> Callable[[str], float]:
    """Return an argparse type that parses a positive number (with ``or_zero``, also 0) of ``clipfast plan``."""

    def parse(text: str) -> float:
        """Parse a number of ``clipfast plan``, which must be finite and positive or, if allowed, 0."""
        value = float(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
        if value < 0 or (value == 0 and not or_zero):
            raise argparse.ArgumentTypeError(f"must be {'at least' if or_zero else 'more than'} 0, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def add_parser(commands: Any) -> None:
    """Add the parser of ``clipfast plan``. Values whose check needs an import are checked when the command runs."""
    parser = commands.add_parser("plan", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("--pairs", type=PAIRS, metavar="N", help="pairs of all GPUs (default: 32768)")
    add("--gpus", type=GPUS, metavar="W", help="GPUs that share the batch (default: 8; of the loss alone 1)")
    add("--embed-dim", type=Count(1, 2**16), metavar="D", help="of the loss alone: size of the features (default: 512)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="of the loss alone: dtype of the features (default: bf16)")
    add("--card", help="a100, h100, h200 or b200 (default: h100)")
    for name, (_, _, text) in MACHINE.items():
        kind = GPUS if name == "gpus_per_node" else _number(or_zero=name.endswith("_us"))
        add(_flag(name), type=kind, metavar="X", help=text)
    add_output(parser, "--json", help="also write everything to FILE")
    _add_training(parser)
    parser.runs(run)


def _add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``clipfast plan`` for a training step."""
    group = parser.add_argument_group("a training step of the trainer")
    add, or_zero = group.add_argument, _number(or_zero=True)
    add("--train", action="store_true", help="plan a whole step of clipfast train, part by part")
    add(
        "--fit", action="store_true",
        help="find the largest batch of each model under DDP and FSDP2 with each kind of checkpointing, and mark the "
        "row with the most pairs/s",
    )  # fmt: skip
    models = "model; with --fit several, separated by commas (default: the seven ViTs from B-32 to bigG-14)"
    add("--model", "--models", metavar="NAME", help=models)
    add("--parallel", help="how GPUs share the work (default: ddp; with --fit, each)", choices=("ddp", "fsdp"))
    kinds = ("none", "selective", "full")
    add("--checkpointing", choices=kinds, help="activations that are recomputed (default: none; with --fit, each)")
    add("--batch-size", help="with --train: pairs of a GPU, in place of --pairs", type=BATCH, metavar="N")
    add("--accumulation", help="micro-batches of which a batch is made (default: 1)", type=COUNT, metavar="N")
    precisions = ("amp_bf16", "amp_fp8", "pure_bf16", "fp32")
    add("--precision", help="as of clipfast train (default: amp_bf16)", choices=precisions)
    recipes = ("switchback", "full")
    add("--fp8-recipe", help="recipe of amp_fp8, as of clipfast train (default: switchback)", choices=recipes)
    add("--opt", help="optimizer, as of clipfast train (default: adamw)", metavar="NAME")
    add("--ema", help="keep an average of the weights", action="store_true")
    add("--no-reshard", help="FSDP2 keeps a block whole from its forward to its backward pass", action="store_true")
    captions = "count packed captions, 18 tokens on average (default: texts as long as the context)"
    add("--captions", help=captions, action="store_true")
    samples = "pairs of the training, such as 12.8e9: also print days and GPU-hours"
    add("--samples-seen", help=samples, type=_number(), metavar="N")
    add("--price-per-gpu-hour", help="also print the cost of the training", type=_number(), metavar="X")
    add("--context-gb", help="1e9 bytes for CUDA, cuBLAS and NCCL (assumed: 1.5)", type=or_zero, metavar="X")
    add("--slack", help="share that the allocator holds beyond tensors (assumed: 0.05)", type=or_zero, metavar="X")


def run(args: argparse.Namespace) -> int:
    """Run ``clipfast plan``: print the plan, and return the exit code.

    Raises:
        ValueError: options contradict each other; the message names the option and a remedy.
    """
    if args.fit and args.train:
        raise ValueError("--fit and --train are two plans: leave one out")
    kind = FIT if args.fit else TRAIN if args.train else OF_LOSS
    for name, plans in PLANS.items():
        if getattr(args, name) not in (None, False) and kind not in plans:
            raise ValueError(f"{_flag(name)} has no effect on {kind}: leave it out, or make the plan of {plans[0]}")
    cluster = _cluster(args)
    (_plan_loss if kind == OF_LOSS else _plan_training)(args, cluster)
    return 0


def _flag(name: str) -> str:
    """Return the flag of an option of ``clipfast plan``."""
    return "--" + name.replace("_", "-")


def _cluster(args: argparse.Namespace) -> "Cluster":
    """Return the GPUs and links that the arguments of ``clipfast plan`` describe."""
    from ..kernels.hardware import CARDS, Cluster

    if args.card not in (None, *CARDS):
        raise ValueError(f"--card: unknown {args.card!r}; known: {', '.join(CARDS)}. For another, take the nearest of "
                         "these and give --tflops, --memory-gb, --link-gbs and --network-gbs")  # fmt: skip
    values = {name: getattr(args, name) * MACHINE[name][1] for name in MACHINE if getattr(args, name) is not None}
    fields = {field: value for name, value in values.items() for field in MACHINE[name][0]}
    if args.tflops is not None:  # --tflops is the rate that products reach, so they reach all of it
        fields |= {"half_reached": 1.0, "single_reached": 1.0}
    card = CARDS[args.card or "h100"]
    of_card = {name: fields.pop(name) for name in [*fields] if hasattr(card, name)}
    return Cluster(dataclasses.replace(card, **of_card), **fields)


def _write(path: Path | None, plan: dict[str, Any]) -> None:
    """Write the plan of ``clipfast plan`` as JSON, if a path is given."""
    if path is not None:
        replace_text(path, json.dumps(plan, indent=1) + "\n")


def _plan_loss(args: argparse.Namespace, cluster: "Cluster") -> None:
    """Run ``clipfast plan`` for the loss alone: predict and print memory, communication and time of each mode."""
    from ..kernels.dtypes import DTYPES
    from ..plan.loss import predict
    from ..plan.planned_step import Problem

    dtype = args.dtype or "bf16"
    problem = Problem(args.pairs or 32768, args.gpus or 1, DTYPES[dtype], args.embed_dim or 512)
    ranks = f"{problem.gpus} ranks of {problem.rows:,} pairs" if problem.gpus > 1 else "one rank"
    rounded = f" (rounded up from {problem.pairs:,})" if problem.pairs % problem.gpus else ""
    print(f"The loss of {problem.rows * problem.gpus:,} pairs{rounded}, D = {problem.embed_dim}, {dtype}; {ranks}\n")
    modes = predict(problem, cluster)
    names = [found["mode"] + " (auto)" * found["is_auto"] for found in modes]
    heads = [head for head in modes[0] if head not in ("mode", "is_auto") and not isinstance(modes[0][head], dict)]
    rows = [[name, *(_cell(head, found[head]) for head in heads)] for name, found in zip(names, modes, strict=True)]
    print(align([["mode", *heads], *rows], right=range(1, len(heads) + 1), indent="  "))
    for what in ("memory by category", "time by phase", "sent by collective"):
        parts = [", ".join(f"{part} {_cell(what, value)}" for part, value in found[what].items()) for found in modes]
        print(f"\n{what}\n" + align(list(zip(names, parts, strict=True)), indent="  "))
    print(f"\n{_rates(problem, cluster)}\n{NOTE}")
    size = dataclasses.asdict(problem) | {"dtype": dtype, "rows": problem.rows}
    _write(args.json, {"problem": size, "note": NOTE, "machine": dataclasses.asdict(cluster), "modes": modes})


def _rates(problem: "Problem", cluster: "Cluster") -> str:
    """Return a text about the rates of GPU and links that ``clipfast plan`` assumes for the loss."""
    card = cluster.card
    gb, gb_per_s = card.memory_bytes / 1e9, card.copied_bytes_per_s / 1e9
    tflops = card.reached(half=problem.dtype.itemsize == 2) / 1e12
    rates = f"{tflops:g} TFLOP/s, {gb:g} GB of memory at {gb_per_s:g} GB/s"
    if problem.gpus > 1:
        collective, ring = (cluster.bytes_per_s(problem.gpus, is_ring=is_ring) / 1e9 for is_ring in (False, True))
        rates += f", {collective:g} GB/s that a rank sends in collectives and {ring:g} GB/s in a ring"
        rates += f", {cluster.latency_s * 1e6:g} us for a message ({cluster.short_latency_s * 1e6:g} for a short one)"
    return f"taken for {card.name}: {rates}, {cluster.launch_s * 1e6:g} us of the host for a kernel."


def _cell(name: str, value: Any) -> str:
    """Format a prediction of ``clipfast plan`` as the cell of a table; the column's ``name`` tells its unit."""
    if name == "sent by collective":
        return f"{scaled(value['bytes'], BYTES)} in {value['messages']:,} messages"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if name.startswith(("memory", "sent")):
        return scaled(value, BYTES)
    return scaled(value, SECONDS) if isinstance(value, float) else scaled(value, COUNTS if name == "FLOPs" else ONES)


def _plan_training(args: argparse.Namespace, cluster: "Cluster") -> None:
    """Run ``clipfast plan --train`` or ``--fit``: predict and print a training step, or the batches that fit."""
    from ..plan.fit import Assumptions

    if args.price_per_gpu_hour is not None and args.samples_seen is None:
        raise ValueError("--price-per-gpu-hour needs --samples-seen: the length of the training")
    assumed = Assumptions(samples_seen=args.samples_seen and round(args.samples_seen), price=args.price_per_gpu_hour)
    if args.context_gb is not None:
        assumed = dataclasses.replace(assumed, context_bytes=args.context_gb * 1e9)
    if args.slack is not None:
        assumed = dataclasses.replace(assumed, slack=args.slack)
    steps = _fit(args, cluster, assumed) if args.fit else [_train(args, cluster, assumed)]
    print(f"\n{TRAINING_NOTE}")
    machine = {"machine": dataclasses.asdict(cluster), "assumed": dataclasses.asdict(assumed)}
    _write(args.json, {"note": TRAINING_NOTE, **machine, "steps": steps})


def _setup(args: argparse.Namespace, model: str) -> "Setup":
    """Return the options of the training step of ``model`` that the arguments of ``clipfast plan`` describe."""
    from ..kernels.hardware import CARDS, has_fp8
    from ..models import SigLIPConfig, get_model_config
    from ..plan.planned_step import Setup
    from ..train.optim import optimizer_class

    if isinstance(get_model_config(model), SigLIPConfig):
        raise ValueError(f"{model} is trained with the sigmoid loss, and plans are made for the contrastive loss only")
    if args.precision == "amp_fp8" and not has_fp8(CARDS[args.card or "h100"].arch):
        raise ValueError(f"--card {args.card} has no fp8: leave out --precision amp_fp8, or take h100, h200 or b200")
    if args.fp8_recipe is not None and args.precision != "amp_fp8":
        raise ValueError("--fp8-recipe needs --precision amp_fp8")
    gpus, parallel, opt = args.gpus or 8, args.parallel or "ddp", args.opt or "adamw"
    if opt.lower() != "muon":
        optimizer_class(opt)
    elif gpus > 1 and (parallel == "fsdp" or (args.fit and args.parallel is None)):
        raise ValueError("--opt muon needs whole matrices, which FSDP2 cuts: set --parallel ddp")
    if args.no_reshard and not args.fit and (parallel != "fsdp" or gpus == 1):
        raise ValueError("--no-reshard is of FSDP2 on several GPUs: set --parallel fsdp and --gpus, or leave it out")
    return Setup(
        model, gpus, parallel, args.checkpointing or "none", args.precision or "amp_bf16", opt, args.ema,
        not args.no_reshard, args.captions, args.fp8_recipe or Setup.fp8_recipe,
    )  # fmt: skip


def _fit(args: argparse.Namespace, cluster: "Cluster", assumed: "Assumptions") -> list[dict[str, Any]]:
    """Predict and print the largest batches that fit into memory (``clipfast plan --fit``), and return them."""
    from ..plan.fit import MODELS, combinations, fit

    models = list(MODELS) if args.model is None else [name.strip() for name in args.model.split(",")]
    setups = [_setup(args, model) for model in models]
    rows = fit(combinations(setups[0], models, args.parallel, args.checkpointing), cluster, assumed,
               args.accumulation or 1)  # fmt: skip
    card = cluster.card
    print(f"The largest batch that fits on {setups[0].gpus} x {card.name}, {_gb(card.memory_bytes)} each\n")
    print(fit_table(rows))
    print('\n"*" marks the row of each model with the most pairs/s.')
    return rows


def fit_table(rows: list[dict[str, Any]]) -> str:
    """Return the text table of ``clipfast plan --fit``: a row for the largest batch of each setup."""
    heads = ["", "model", "parallel", "checkpointing", "per GPU", "global batch", "memory", "step", "pairs/s", "MFU"]
    extra = [name for name in ("days", "gpu_hours", "cost") if any(name in row for row in rows)]
    cells = [["*" if row["is_best"] else "", *fit_cells(row), *(_amount(row, name) for name in extra)] for row in rows]
    heads += [{"gpu_hours": "GPU-hours"}.get(name, name) for name in extra]
    return align([heads, *cells], right=range(4, len(heads)))


def fit_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row in the table of ``clipfast plan --fit``, from the model's name to MFU."""
    names = [row["model"], row["parallel"].replace("fsdp", "fsdp2"), row["checkpointing"]]
    if not row["fits"]:
        return [*names, "none fits", *[""] * 5]
    return [
        *names, f"{row['batch_per_gpu']:,}", f"{row['global_batch']:,}", _gb(row["memory"]),
        scaled(row["time"], SECONDS), f"{row['pairs_per_s']:,.0f}", f"{row['mfu']:.0%}",
    ]  # fmt: skip


def _train(args: argparse.Namespace, cluster: "Cluster", assumed: "Assumptions") -> dict[str, Any]:
    """Predict and print memory and time of a training step (``clipfast plan --train``), and return them."""
    from ..plan.fit import Batch, StepPlan, describe

    if args.model is None:
        raise ValueError("--train needs --model: the model that is trained")
    if args.batch_size is not None and args.pairs is not None:
        raise ValueError("--batch-size and --pairs both say how large a batch is: leave one out")
    setup, accumulation = _setup(args, args.model), args.accumulation or 1
    pairs = args.batch_size or -(-(args.pairs or 32768) // setup.gpus)
    if accumulation > pairs:
        raise ValueError(f"--accumulation {accumulation} is more than the {pairs} pairs of a GPU")
    found = describe(StepPlan(setup, cluster, cluster.card), Batch(pairs, -(-pairs // accumulation)), assumed)
    parts = f" in {accumulation} micro-batches" if accumulation > 1 else ""
    recipe = f" ({setup.fp8_recipe})" if setup.precision == "amp_fp8" else ""
    print(
        f"{setup.model} on {setup.gpus} x {cluster.card.name}: {found['global_batch']:,} pairs, {pairs:,} a GPU"
        f"{parts}; {setup.parallel if setup.gpus > 1 else 'one GPU'}, checkpointing {setup.checkpointing}, "
        f"{setup.precision}{recipe}, {setup.opt}"
    )
    _print_parts("memory of a GPU at its peak", found["memory_by_category"], _gb)
    print(f"  {'fits' if found['fits'] else 'DOES NOT FIT'} into {_gb(cluster.card.memory_bytes)}")
    _print_parts("time of a step", found["time_by_part"], lambda value: scaled(value, SECONDS))
    if found["sent_by_part"]:
        _print_parts("sent by a GPU in a step", found["sent_by_part"], lambda value: scaled(value, BYTES))
    print(f"\n{found['pairs_per_s']:,.0f} pairs/s of the cluster, MFU {found['mfu']:.1%}")
    if "days" in found:
        days, hours, cost = (_amount(found, name) for name in ("days", "gpu_hours", "cost"))
        time = f"{days} days" if found["days"] >= 1 else f"{24 * found['days']:,.2g} hours"
        print(f"{assumed.samples_seen:,} pairs: {time}, {hours} GPU-hours" + f", costs {cost}" * bool(cost))
    return found


def _print_parts(title: str, parts: dict[str, float], shown: Callable[[Any], str]) -> None:
    """Print the parts of a prediction of ``clipfast plan``, such as memory by category, and their sum."""
    rows = [*parts.items(), ("together", sum(parts.values()))]
    print(f"\n{title}\n" + align([[name, shown(value)] for name, value in rows], right=(1,), indent="  "))


def _gb(value: float) -> str:
    """Format bytes as gigabytes for ``clipfast plan``."""
    return f"{value / 1e9:.2f} GB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def _amount(row: dict[str, Any], name: str) -> str:
    """Format days, GPU-hours or cost in a prediction of ``clipfast plan``; "" if it was not predicted."""
    value = row.get(name)
    return "" if value is None else f"{value:.2g}" if value < 1 else f"{value:,.{1 if value < 1000 else 0}f}"
