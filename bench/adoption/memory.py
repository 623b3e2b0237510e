"""``python -m clipfast.bench.adoption.memory``: the memory of a training step of transformers' models with tiny towers.

Where towers are tiny, the loss takes most of the memory. Each figure is the peak of a step, forward and backward, on a
CPU, beyond what a process of its own held before. The last row is of transformers' ``Trainer``, which also holds the
gradients, AdamW's state and batches: the largest rank's peak, with as many pairs on each.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clipfast
from clipfast.ranks import run_ranks

from ..memory import growth

FAMILIES = ("clip", "siglip")
_END = 99
_TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 8, "bos_token_id": 98, "eos_token_id": _END, "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def make(family: str) -> Any:
    """Return a tiny ``CLIPModel`` or ``SiglipModel`` of transformers in training mode."""
    import transformers

    torch.manual_seed(0)
    if family == "clip":
        config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=512)
        return transformers.CLIPModel(config).train()
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=_TEXT, vision_config=_VISION)).train()


def make_batch(pairs: int) -> dict[str, Tensor]:
    """Return random texts and images."""
    texts = torch.randint(1, 97, (pairs, 8))
    texts[:, 5] = _END
    return {"input_ids": texts, "pixel_values": torch.randn(pairs, 3, 8, 8)}


def step_bytes(family: str, ours: bool, pairs: int) -> int:
    """Return the bytes that a training step of ``pairs`` pairs needs in this process, with our kernels or without."""
    model = make(family)
    if ours:
        clipfast.apply_to_hf(model)
    batch = make_batch(pairs)

    def step(number: int) -> None:
        model(**{key: x[:number] for key, x in batch.items()}, return_loss=True).loss.backward()

    step(min(pairs, 64))  # libraries allocate what they keep
    model.zero_grad()
    return growth(lambda: step(pairs))


def measure(family: str, ours: bool, pairs: int) -> int:
    """Return :func:`step_bytes` of a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_bytes, family, ours, pairs).result()


def trainer_bytes(rank: int, world_size: int, ours: bool, pairs: int, folder: str) -> int:
    """Return the bytes that three steps of transformers' ``Trainer`` need on this rank, each of ``pairs`` pairs."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    # transformers reads them to know that there is a process group.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    model = make("clip")
    if ours:
        clipfast.apply_to_hf(model)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=pairs, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    if arguments.world_size != world_size:
        raise RuntimeError(f"transformers trains on {arguments.world_size} ranks, where there are {world_size}")
    rows: Any = range(3 * world_size * pairs)  # the collator makes the pairs
    trainer = Trainer(
        model, arguments, data_collator=lambda rows: {**make_batch(len(rows)), "return_loss": True}, train_dataset=rows
    )
    trainer.remove_callback(PrinterCallback)  # the table is what is printed
    return growth(trainer.train)


def measure_trainer(ours: bool, pairs: int, world_size: int = 2) -> int:
    """Return the largest :func:`trainer_bytes` of several new processes."""
    with tempfile.TemporaryDirectory() as folder:
        ranks, output = Path(folder, "ranks"), str(Path(folder, "output"))
        ranks.mkdir()
        return max(run_ranks(trainer_bytes, world_size, world_size, ours, pairs, output, folder=ranks, timeout=1800.0))


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of MiB, and return 0."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.bench.adoption.memory", description=__doc__)
    parser.add_argument("--pairs", type=int, default=4096, help="pairs in the batch (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {args.pairs}")
    print(f"| {args.pairs:,} pairs | transformers, MiB | with clipfast.apply_to_hf, MiB |\n|---|---|---|")
    for family in FAMILIES:
        theirs, ours = (measure(family, is_ours, args.pairs) / 2**20 for is_ours in (False, True))
        print(f"| {family} | {theirs:.0f} | {ours:.0f} |", flush=True)
    theirs, ours = (measure_trainer(is_ours, args.pairs) / 2**20 for is_ours in (False, True))
    print(f"| clip, Trainer, on each of 2 ranks | {theirs:.0f} | {ours:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
