"""What can be measured: one module for each kind of computation, with its shapes, its inputs and its candidates."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from ..case import DTYPES, Case
from . import attention, blocks, data, loss, losses, patch, pool, retrieval, step, text, tokenizer

Shape = Mapping[str, int | str | bool]


@dataclasses.dataclass(frozen=True)
class Suite:
    """A kind of computation.

    Attributes:
        help: one line.
        shapes: default shapes on a device type, "cpu" or "cuda".
        build: a case from a shape, a dtype's name and a device.
        fields: sizes that a shape must name, with an example of each.
        smallest: a shape that shows whether everything runs.
    """

    help: str
    shapes: Callable[[str], list[Shape]]
    build: Callable[[Shape, str, torch.device], Case]
    fields: Shape
    smallest: Shape


SUITES = {
    "loss": Suite("contrastive loss, forward and backward", loss.shapes, loss.build, loss.FIELDS, loss.SMALLEST),
    "sigmoid": Suite(
        "sigmoid loss, forward and backward", losses.shapes, losses.sigmoid, losses.FIELDS, losses.SMALLEST
    ),
    "info_nce": Suite(
        "InfoNCE with a queue of negatives, forward and backward",
        losses.queue_shapes,
        losses.info_nce,
        losses.QUEUE_FIELDS,
        losses.QUEUE_SMALLEST,
    ),
    "nt_xent": Suite(
        "NT-Xent of two views, forward and backward", losses.shapes, losses.nt_xent, losses.FIELDS, losses.SMALLEST
    ),
    "attention": Suite(
        "attention on the packed projection, forward and backward",
        attention.shapes,
        attention.build,
        attention.FIELDS,
        attention.SMALLEST,
    ),
    "attention_pool": Suite(
        "attention pooling of the ResNets, forward and backward", pool.shapes, pool.build, pool.FIELDS, pool.SMALLEST
    ),
    "layer_norm": Suite(
        "layer norm, with the addition before it or without, forward and backward",
        blocks.norm_shapes,
        blocks.norm,
        blocks.NORM_FIELDS,
        blocks.NORM_SMALLEST,
    ),
    "layer_norm_pair": Suite(
        "two layer norms in a row, forward and backward",
        blocks.pair_shapes,
        blocks.norm_pair,
        blocks.PAIR_FIELDS,
        blocks.PAIR_SMALLEST,
    ),
    "bias_act": Suite(
        "GELU and QuickGELU with a bias, forward and backward",
        blocks.act_shapes,
        blocks.bias_act,
        blocks.ACT_FIELDS,
        blocks.ACT_SMALLEST,
    ),
    "patch": Suite(
        "patch embedding from bytes, forward and backward", patch.shapes, patch.build, patch.FIELDS, patch.SMALLEST
    ),
    "text": Suite("text embedding, forward and backward", text.shapes, text.build, text.FIELDS, text.SMALLEST),
    "patch_kept": Suite(
        "patch embedding of half of the patches", patch.shapes, patch.build_kept, patch.FIELDS, patch.SMALLEST
    ),
    "patch_floats": Suite(
        "patch embedding from floats, and the gradient of the images",
        patch.shapes,
        patch.build_floats,
        patch.FIELDS,
        patch.SMALLEST,
    ),
    "retrieval": Suite(
        "retrieval ranks without the scores", retrieval.shapes, retrieval.build, retrieval.FIELDS, retrieval.SMALLEST
    ),
    "step": Suite(
        "a whole training step: forward, loss, backward, AdamW", step.shapes, step.build, step.FIELDS, step.SMALLEST
    ),
    "data": Suite("decoding and transforming images", data.shapes, data.build, data.FIELDS, data.SMALLEST),
    "tokenizer": Suite(
        "captions to token ids", tokenizer.shapes, tokenizer.build, tokenizer.FIELDS, tokenizer.SMALLEST
    ),
}


def build(suite: str, shape: Shape, dtype: str, device: torch.device) -> Case:
    """One case by the name of its suite.

    Raises:
        ValueError: no such suite or dtype, or sizes that the suite does not have or that are missing.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}: choose from {', '.join(SUITES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    fields = SUITES[suite].fields
    if set(shape) != set(fields):
        example = " ".join(f"{key}={value}" for key, value in fields.items())
        raise ValueError(f"a shape of {suite} looks like {example!r}, got {dict(shape)!r}")
    for key, value in shape.items():
        if type(value) is not type(fields[key]) or (type(value) is int and value < 1):
            raise ValueError(f"{suite}: {key}={value!r} must be like {fields[key]!r}, and positive")
    return SUITES[suite].build(shape, dtype, device)
