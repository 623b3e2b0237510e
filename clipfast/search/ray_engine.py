"""``clipfast embed --engine ray``: Ray Data gives the parts to actors, each with the model, on one machine or many."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embed import Work


class PartMaker:
    """An actor that makes parts. A part that a killed actor had begun is made again by another one.

    Args:
        args: of the command.
        folder: the working folder, from which the names of files start.
    """

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        from ..training.world import ALONE
        from .embed_command import work_of

        os.chdir(folder)
        self.work = work_of(args, ALONE)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the parts whose numbers are in ``batch``, unless they are there."""
        numbers = [int(number) for number in batch["part"]]
        self.work.make([number for number in numbers if not self.work.holds(number)])
        return batch


def make_parts(args: argparse.Namespace, work: Work, numbers: Sequence[int], advance: Callable[[int], object]) -> None:
    """Make the parts with these numbers on the Ray cluster that there is (RAY_ADDRESS), or on this machine.

    Args:
        args: of the command. All machines must see its model, its data and its output under the same names.
        work: that they stand for.
        numbers: of the parts.
        advance: is called with the number of samples that are done.

    Raises:
        ValueError: Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError("--engine ray needs Ray: pip install 'clipfast[ray]'") from error
    if not numbers:
        return
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = ray.cluster_resources().get("GPU", 0) if args.device != "cpu" else 0
    actors = args.workers or int(gpus or ray.cluster_resources().get("CPU", 1))
    parts = ray.data.from_items([{"part": number} for number in numbers], override_num_blocks=len(numbers))
    done = parts.map_batches(
        PartMaker, fn_constructor_args=(args, os.getcwd()), batch_size=1, num_gpus=1 if gpus else None,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors, len(numbers)))),
    )  # fmt: skip
    try:
        for row in done.iter_rows():
            advance(len(work.parts[row["part"]]))
    finally:
        ray.shutdown()
