"""The data pipeline and each of its stages, from shards of photographs to batches on the device, against OpenCLIP's.

Data workers are processes of one thread each, so what counts is the CPU time of one thread; only the copy to the device
is timed by the clock.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..case import OURS, Candidate, Case, Sizes
from ..machine import cpu_seconds
from .pipelines import BATCH
from .stages import STAGES, Photographs

FIELDS: Sizes = {"stage": "pipeline", "images": 1024, "width": 512, "height": 512, "size": 224}
SMALLEST: Sizes = {"stage": "pipeline", "images": 4, "width": 64, "height": 48, "size": 32}
# Photographs of a size that is common on the web, resized to what most models take.
_DEFAULT: list[Sizes] = [{**FIELDS, "images": 1024 if stage == "pipeline" else 256, "stage": stage} for stage in STAGES]
SHAPES = {"cpu": _DEFAULT, "cuda": _DEFAULT}


def build(shape: Mapping[str, Any], dtype: str, device: torch.device) -> Case:
    """Return the case of one stage, or of the pipeline as a whole."""
    name, count = shape["stage"], shape["images"]
    if name not in STAGES:
        raise ValueError(f"data: stage must be one of {', '.join(STAGES)}, got {name!r}")
    if name == "pipeline" and count % min(count, BATCH):
        raise ValueError(f"data: images must be a multiple of the batch of {BATCH}, got {count}")
    stage = STAGES[name](Photographs(count, shape["width"], shape["height"], shape["size"]), device)
    candidates = tuple(
        Candidate(who, make, note=stage.note if who == OURS else "", context=_one_thread)
        for who, make in stage.make.items()
    )
    return Case(
        suite="data", op=f"data.{name}", shape=shape, dtype=dtype, device=device,
        inputs=lambda: {"order": torch.randperm(count)},
        candidates=candidates,
        reference=candidates[0],
        items=(count, stage.unit),
        slack={"value": stage.slack},
        graph=False,
        clock=time.perf_counter if name == "transfer" else cpu_seconds,
    )  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
