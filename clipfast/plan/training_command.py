"""The part of ``clipfast plan`` that is about whole training steps: its options, tables and JSON."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import BATCH, COUNT
from ..columns import align
from ..files import replace_text
from ..units import BYTES, SECONDS, scaled

if TYPE_CHECKING:
    from ..kernels.hardware import Cluster
    from .fit import Assumptions
    from .setup import Setup

NOTE = """\
Predicted, never measured on a GPU. Counted on fake tensors: activations, gathered weights, scratch, weights, optimizer,
FLOPs, kernels. Assumed: published rates of the card, reached by every kernel that is large; latencies; CUDA, NCCL and
allocator as marked; messages and kernels that do not slow each other down; no wait for data, evaluation or checkpoints.
The kernels of attention and of the loss are slower than that (docs/predicted.md), so take times as lower limits."""
# Options that only these plans have: argparse's name, and what is taken if they are not given.
OPTIONS: dict[str, Any] = {
    "models": None, "parallel": None, "checkpointing": None, "batch_size": None, "accumulation": 1,
    "precision": "amp_bf16", "opt": "adamw", "ema": False, "no_reshard": False, "samples_seen": None,
    "price_per_gpu_hour": None, "context_gb": 1.5, "slack": 0.05,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, number: Callable[..., Any]) -> None:
    """Add the options. ``number`` makes what parses numbers that are not counts."""
    group = parser.add_argument_group(
        "a training step of the trainer", "with --train for one batch, with --fit for the largest that fits"
    )

    def add(flag: str, text: str, **options: Any) -> None:
        group.add_argument(flag, help=text, default=argparse.SUPPRESS, **options)

    group.add_argument("--train", action="store_true", help="plan a whole step of clipfast train, part by part")
    group.add_argument(
        "--fit", action="store_true",
        help="find the largest batch of each model under DDP and FSDP2 with each kind of checkpointing, and mark the "
        "row with the most pairs/s",
    )  # fmt: skip
    add(
        "--models", "with --fit: models, separated by commas (default: --model, or the seven ViTs from B-32 to bigG-14)"
    )
    add("--parallel", "how GPUs share the work (default: ddp; with --fit, each)", choices=("ddp", "fsdp"))
    kinds = ("none", "selective", "full")
    add("--checkpointing", "what the backward pass computes again (default: none; with --fit, each)", choices=kinds)
    add("--batch-size", "with --train: pairs of a GPU, in place of --pairs", type=BATCH, metavar="N")
    add("--accumulation", "micro-batches of which a batch is made (default: 1)", type=COUNT, metavar="N")
    precisions = ("amp_bf16", "pure_bf16", "fp32")
    add("--precision", "as of clipfast train (default: amp_bf16)", choices=precisions)
    add("--opt", "optimizer, as of clipfast train (default: adamw)", metavar="NAME")
    add("--ema", "keep an average of the weights", action="store_true")
    add("--no-reshard", "FSDP2 keeps a block whole from its forward to its backward pass", action="store_true")
    samples = "pairs of the training, such as 12.8e9: also print days and GPU-hours"
    add("--samples-seen", samples, type=number(), metavar="N")
    add("--price-per-gpu-hour", "also print what the training costs", type=number(), metavar="X")
    or_zero = number(or_zero=True)
    add("--context-gb", "1e9 bytes for CUDA, cuBLAS and NCCL (assumed: 1.5)", type=or_zero, metavar="X")
    add("--slack", "share that the allocator holds beyond tensors (assumed: 0.05)", type=or_zero, metavar="X")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: the message names the option and what to do.
    """
    given = [name for name in OPTIONS if hasattr(args, name)]
    kind = "fit" if args.fit else "train" if args.train else None
    if args.fit and args.train:
        raise ValueError("--fit and --train are two plans: leave one out")
    if kind is None and given:
        raise ValueError(f"{_flag(given[0])} belongs to a training step: add --train or --fit")
    unfit = {"fit": ("pairs", "batch_size", "check"), "train": ("models",), None: ()}[kind]
    unfit = (*unfit, *(("embed_dim", "largest") if kind else ()))
    wrong = [name for name in unfit if getattr(args, name, None)]
    if wrong:
        raise ValueError(f"{_flag(wrong[0])} has no effect with --{kind}: leave it out")
    if kind is None:
        return
    if args.dtype != "bf16":
        raise ValueError(f"--dtype {args.dtype} is of the loss alone: set --precision for a training step")
    if kind == "train" and args.model is None:
        raise ValueError("--train needs --model: the model that is trained")
    if hasattr(args, "models") and args.model is not None:
        raise ValueError("--models and --model both say which model is planned: leave one out")
    if hasattr(args, "price_per_gpu_hour") and not hasattr(args, "samples_seen"):
        raise ValueError("--price-per-gpu-hour needs --samples-seen: the length of the training")
    if hasattr(args, "batch_size") and args.pairs is not None:
        raise ValueError("--batch-size and --pairs both say how large a batch is: leave one out")
    for name in ("parallel", "checkpointing") if args.check else ():
        if hasattr(args, name):
            raise ValueError(f"--check tries every value of {_flag(name)}: leave it out")
    for name in ("samples_seen", "price_per_gpu_hour", "context_gb", "slack") if args.check else ():
        if hasattr(args, name):
            raise ValueError(f"{_flag(name)} has no effect with --check: leave it out")


def run(args: argparse.Namespace, cluster: "Cluster") -> int:
    """Print the plan of a training step, or what fits, or what the check found, and return the exit code."""
    from .fit import Assumptions

    options = {name: getattr(args, name, default) for name, default in OPTIONS.items()}
    samples = options["samples_seen"]
    assumed = Assumptions(
        options["context_gb"] * 1e9, options["slack"], None if samples is None else round(samples),
        options["price_per_gpu_hour"],
    )  # fmt: skip
    if args.check:
        return _check(args, options)
    rows = _fit(args, options, cluster, assumed) if args.fit else [_train(args, options, cluster, assumed)]
    print(f"\n{NOTE}")
    if args.json is not None:
        plan = {"note": NOTE, "machine": dataclasses.asdict(cluster), "assumed": dataclasses.asdict(assumed)}
        replace_text(args.json, json.dumps({**plan, "steps": rows}, indent=1) + "\n")
    return 0


def _setup(args: argparse.Namespace, options: dict[str, Any], model: str, gpus: int) -> "Setup":
    from ..models import SigLIPConfig, get_model_config
    from ..training.optim import optimizer_class
    from .setup import Setup

    if isinstance(get_model_config(model), SigLIPConfig):
        raise ValueError(f"{model} is trained with the sigmoid loss, and plans are made for the contrastive loss only")
    parallel, is_muon = options["parallel"] or "ddp", options["opt"].lower() == "muon"
    if not is_muon:
        optimizer_class(options["opt"])
    if is_muon and gpus > 1 and (parallel == "fsdp" or (args.fit and options["parallel"] is None)):
        raise ValueError("--opt muon needs whole matrices, which FSDP2 cuts: set --parallel ddp")
    if options["no_reshard"] and not args.fit and (parallel != "fsdp" or gpus == 1):
        raise ValueError("--no-reshard is of FSDP2 on several GPUs: set --parallel fsdp and --gpus, or leave it out")
    return Setup(
        model, gpus, parallel, options["checkpointing"] or "none", options["precision"], options["opt"],
        options["ema"], not options["no_reshard"],
    )  # fmt: skip


def _fit(
    args: argparse.Namespace, options: dict[str, Any], cluster: "Cluster", assumed: "Assumptions"
) -> list[dict[str, Any]]:
    from .fit import MODELS, combinations, fit

    names = args.model if options["models"] is None else options["models"]
    models = list(MODELS) if names is None else [name.strip() for name in names.split(",")]
    gpus = args.gpus or 8
    setups = [_setup(args, options, model, gpus) for model in models]
    rows = fit(combinations(setups[0], models, options["parallel"], options["checkpointing"]), cluster, assumed,
               options["accumulation"])  # fmt: skip
    print(f"The largest batch that fits on {gpus} x {cluster.card.name}, {_gb(cluster.card.memory_bytes)} each\n")
    print(fit_table(rows))
    print('\n"*" marks the row of each model with the most pairs/s.')
    return rows


def fit_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of what fits."""
    heads = ["", "model", "parallel", "checkpointing", "per GPU", "global batch", "memory", "step", "pairs/s", "MFU"]
    extra = [name for name in ("days", "gpu_hours", "cost") if any(name in row for row in rows)]
    cells = [["*" if row["is_best"] else "", *fit_cells(row), *(_amount(row, name) for name in extra)] for row in rows]
    names = {"gpu_hours": "GPU-hours"}
    return align(
        [[*heads, *(names.get(name, name) for name in extra)], *cells], right=range(4, len(heads) + len(extra))
    )


def fit_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a row of what fits, from the model to the utilisation."""
    names = [row["model"], row["parallel"].replace("fsdp", "fsdp2"), row["checkpointing"]]
    if not row["fits"]:
        return [*names, "none fits", *[""] * 5]
    return [
        *names, f"{row['batch_per_gpu']:,}", f"{row['global_batch']:,}", _gb(row["memory"]),
        scaled(row["time"], SECONDS), f"{row['pairs_per_s']:,.0f}", f"{row['mfu']:.0%}",
    ]  # fmt: skip


def _train(
    args: argparse.Namespace, options: dict[str, Any], cluster: "Cluster", assumed: "Assumptions"
) -> dict[str, Any]:
    from .fit import describe
    from .training import Batch, StepPlan

    gpus = args.gpus or 8
    setup, batch = _setup(args, options, args.model, gpus), _batch(args, options, gpus, 32768)
    found = describe(StepPlan(setup, cluster, cluster.card), Batch(*batch), assumed)
    parts = f" in {options['accumulation']} micro-batches" if options["accumulation"] > 1 else ""
    print(
        f"{setup.model} on {gpus} x {cluster.card.name}: {found['global_batch']:,} pairs, {batch[0]:,} a GPU{parts}; "
        f"{setup.parallel if gpus > 1 else 'one GPU'}, checkpointing {setup.checkpointing}, {setup.precision}, "
        f"{setup.opt}"
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


def _batch(args: argparse.Namespace, options: dict[str, Any], gpus: int, pairs: int) -> tuple[int, int]:
    """Return the pairs of a GPU and those of a micro-batch."""
    rows = options["batch_size"] or -(-(args.pairs or pairs) // gpus)
    if options["accumulation"] > rows:
        raise ValueError(f"--accumulation {options['accumulation']} is more than the {rows} pairs of a GPU")
    return rows, -(-rows // options["accumulation"])


def _check(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from .training import Batch
    from .training_check import check_training

    gpus = args.gpus or 2
    if not 2 <= gpus <= 8:
        raise ValueError(f"--check of a training step runs 2 to 8 ranks on this machine, got --gpus {gpus}")
    setup, batch = _setup(args, options, args.model, gpus), _batch(args, options, gpus, 64 * gpus)
    rows = check_training(setup, Batch(*batch))
    heads = ["parallel", "checkpointing", "what", "predicted", "measured"]
    cells = [[*(f"{row[head]:,}" if isinstance(row[head], int) else row[head] for head in heads),
              "" if row["agrees"] else "WRONG"] for row in rows]  # fmt: skip
    print(align([[*heads, ""], *cells], right=(3, 4), indent="  "))
    wrong = sum(not row["agrees"] for row in rows)
    print(f"\n{len(rows)} figures: {len(rows) - wrong} as predicted, {wrong} not.")
    if args.json is not None:
        replace_text(args.json, json.dumps({"problem": dataclasses.asdict(setup), "check": rows}, indent=1) + "\n")
    return int(wrong > 0)


def _print_parts(title: str, parts: dict[str, float], shown: Callable[[Any], str]) -> None:
    rows = [*parts.items(), ("together", sum(parts.values()))]
    print(f"\n{title}\n" + align([[name, shown(value)] for name, value in rows], right=(1,), indent="  "))


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def _amount(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else f"{value:.2g}" if value < 1 else f"{value:,.{1 if value < 1000 else 0}f}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
