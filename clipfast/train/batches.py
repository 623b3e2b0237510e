"""The batch sizes of a training run: those of its options, or those of the checkpoint from which it resumes."""

import dataclasses
from typing import Any

from ..data import BatchPlan, BudgetedBatches, EqualBatches, TokenBudget
from ..distributed.world import World
from .naflex_options import SEQ_LENS
from .schedule import Epochs
from .train_config import TrainConfig

# Maps a NaFlex option of ``TrainConfig`` to the field of ``TokenBudget`` that holds its value.
BUDGET = {
    "naflex_seq_lens": "seq_lens",
    "naflex_seq_len_probs": "seq_len_probs",
    "naflex_patch_sizes": "patch_sizes",
    "naflex_patch_size_probs": "patch_size_probs",
    "naflex_max_tokens_per_batch": "max_tokens",
    "naflex_batch_divisor": "divisor",
}
PROCESSES = "processes"
# A checkpoint's entry "stream" describes the data order. This maps its keys for NaFlex to fields of ``TokenBudget``.
STREAM = BUDGET | {PROCESSES: PROCESSES}


def whole_batch(config: TrainConfig, world: World, saved: dict[str, Any]) -> int:
    """Return the global batch size: the pairs that all processes together see in a training step.

    A resumed run keeps its global batch size on any number of processes, unless its options change.

    Args:
        config: options of the run.
        world: the processes.
        saved: the entry ``clipfast`` of the checkpoint that the run continues; {} without a checkpoint.

    Raises:
        ValueError: the batch cannot be divided among the processes.
    """
    options, stream = saved.get("config", {}), saved.get("stream", {})
    whole = config.global_batch_size or config.batch_size * world.size
    is_kept = config.global_batch_size is None and options.get("batch_size") == config.batch_size
    if is_kept and options.get("global_batch_size") is None:
        whole = stream.get("batch_size", whole)
    if whole % world.size:
        raise ValueError(
            f"a batch of {whole} pairs cannot be divided among {world.size} processes: start a number that divides it, "
            f"or give another --global-batch-size{' at the end of an epoch' if stream else ''}"
        )
    return whole


def plan_of(config: TrainConfig, world: World, saved: dict[str, Any]) -> BatchPlan:
    """Return the number of pairs (for NaFlex, of patches too) of each batch of a run, as a ``BatchPlan``.

    Arguments are those of :func:`whole_batch`. A resumed run keeps its global batches on any number of processes,
    unless its options change.

    Raises:
        ValueError: a batch cannot be divided among the processes, or the options need batches of one size.
    """
    if not config.use_naflex:
        return EqualBatches(whole_batch(config, world, saved))
    if config.unique_by is not None:
        raise ValueError(
            f"--unique-by {config.unique_by} deals pairs to batches of equal sizes, which those of --use-naflex are "
            "not: leave one of them out"
        )
    given = {name: getattr(config, key) for key, name in BUDGET.items()}
    budget = TokenBudget(**given | {"seq_lens": config.naflex_seq_lens or SEQ_LENS}, processes=world.size)
    stream = saved.get("stream", {})
    kept = dataclasses.replace(budget, processes=stream.get(PROCESSES, world.size))
    budget = kept if stream_of(BudgetedBatches(kept, config.seed)).items() <= stream.items() else budget
    budget.refuse_ranks(world.size)
    return BudgetedBatches(budget, config.seed)


def stream_of(plan: BatchPlan) -> dict[str, Any]:
    """Return the batch sizes of a run as the entries that a checkpoint's "stream" has for them."""
    if isinstance(plan, EqualBatches):
        return {"batch_size": plan.largest}
    values = {key: getattr(plan.budget, name) for key, name in STREAM.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def epochs_in(stream: dict[str, Any]) -> Epochs:
    """Return the epochs of the run that wrote a checkpoint with this "stream"; ``total_steps`` is 0, as it is unknown.

    Raises:
        KeyError: the stream lacks an entry.
    """
    if "batch_size" in stream:
        return Epochs(stream["num_samples"], EqualBatches(stream["batch_size"]), 0)
    values: dict[str, Any] = {name: stream[key] for key, name in STREAM.items()}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    budget = TokenBudget(**values)
    tokens = stream["naflex_num_train_image_tokens"]
    plan = BudgetedBatches(budget, stream["seed"])
    return Epochs(stream["num_samples"], plan, 0) if tokens is None else Epochs(tokens, plan, 0, "tokens")
