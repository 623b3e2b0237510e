"""Check which options of ``clipfast train`` work with ``--fsdp``."""

from typing import TYPE_CHECKING

from .option_checks import AUTO, flag_name

if TYPE_CHECKING:
    from .train_config import TrainConfig

# These optimizers update each element of a weight by itself, so they also work on FSDP2's shards of weights.
FSDP_OPTIMIZERS = (
    "adamw", "adam", "nadam", "nadamw", "radam", "adamax", "adagrad", "adadelta", "rmsprop", "asgd", "sgd",
)  # fmt: skip


def check_fsdp(config: "TrainConfig") -> None:
    """Check that the training options work with FSDP2 if ``--fsdp`` is given, and do not need it otherwise.

    Raises:
        ValueError: an option does not work with ``--fsdp``, or needs it; the message says which option to leave out.
    """
    parts = [name for name in ("fsdp_no_reshard_after_forward", "fsdp_offload_cpu") if getattr(config, name)]
    if not config.fsdp and parts:
        raise ValueError(f"{flag_name(parts[0])} needs --fsdp")
    if not config.fsdp and config.fsdp_checkpoint != "full":
        raise ValueError(f"--fsdp-checkpoint {config.fsdp_checkpoint} needs --fsdp: give it, or --fsdp-checkpoint full")
    refused = {
        "--cuda-graphs": (config.cuda_graphs, "weights are gathered anew in every step"),
        "--ddp-static-graph": (config.ddp_static_graph, "it is for DistributedDataParallel"),
        "--use-bn-sync": (config.use_bn_sync, "a ResNet fits on one GPU"),
        "--micro-batch-size auto": (config.micro_batch_size == AUTO, "a rank that tries alone would wait for others"),
    }
    for flag, (is_set, reason) in refused.items() if config.fsdp else ():
        if is_set:
            raise ValueError(f"{flag} does not work with --fsdp, since {reason}: leave one of them out")
    if config.fsdp and config.opt.lower() not in FSDP_OPTIMIZERS:
        raise ValueError(
            f"--opt {config.opt} does not work with --fsdp, which cuts every weight into parts: choose one of "
            f"{', '.join(FSDP_OPTIMIZERS)}, or leave out --fsdp"
        )
