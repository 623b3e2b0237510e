"""The suites of benchmarks: one for each op, by its specification, and a module for each other computation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch

from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.spec import OpSpec, specs

from ..case import Case, Sizes
from . import data, ops, step, strips


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of benchmarks: one kind of computation, with its default shapes and the function that makes its cases."""

    help: str  # one line for the help text of the suite's command
    shapes: Mapping[str, list[Sizes]]  # default shapes by the type of device, "cpu" or "cuda"
    build: Callable[[Sizes, str, torch.device], Case]  # makes a case from a shape, a dtype's name and a device
    fields: Sizes  # the names of the sizes of a shape, each with an example value
    smallest: Sizes  # a small shape for testing that everything runs
    optional: frozenset[str] = frozenset()  # sizes that a shape need not name
    dtypes: tuple[str, ...] = ()  # the dtypes that the suite supports; empty means all
    op: OpSpec | None = None  # the op's specification, if the suite measures an op


def _suite_of(spec: OpSpec) -> Suite:
    """Return the benchmark suite of an op from its specification."""
    title = (spec.op.__doc__ or spec.name).strip().splitlines()[0].rstrip(".")
    example, fields = spec.bench["cuda"][0], dataclasses.fields(spec.small[0])
    return Suite(
        help=title if title.split()[0][1:] != title.split()[0][1:].lower() else f"{title[0].lower()}{title[1:]}",
        shapes={device: [shape.to_dict() for shape in shapes] for device, shapes in spec.bench.items()},
        build=functools.partial(ops.build, spec),
        fields={field.name: 1 if (value := getattr(example, field.name)) is None else value for field in fields},
        smallest=spec.small[0].to_dict(),
        optional=frozenset(field.name for field in fields if field.default is not dataclasses.MISSING),
        op=spec,
    )


_FP32 = ("fp32",)
SUITES = {spec.suite_name: _suite_of(spec) for spec in specs().values()} | {
    "step": Suite(
        "a whole training step: forward, loss, backward, AdamW", step.SHAPES, step.build, step.FIELDS, step.SMALLEST
    ),
    "strips": Suite(
        "the loss of all ranks on one of them, without messages",
        strips.SHAPES,
        strips.build,
        strips.FIELDS,
        strips.SMALLEST,
    ),
    "data": Suite(
        "the data pipeline and its stages", data.SHAPES, data.build, data.FIELDS, data.SMALLEST, dtypes=_FP32
    ),
}


def build(suite: str, shape: Sizes, dtype: str, device: torch.device) -> Case:
    """Make one benchmark case by the name of its suite.

    Raises:
        ValueError: no such suite or dtype, or sizes that the suite does not have or that are missing.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}: choose from {', '.join(SUITES)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found = SUITES[suite]
    if not set(found.fields) - found.optional <= set(shape) <= set(found.fields):
        example = " ".join(f"{key}={value}" for key, value in found.shapes["cuda"][0].items())
        raise ValueError(f"a shape of {suite} looks like {example!r}, got {dict(shape)!r}")
    for key, value in shape.items():
        example_value = found.fields[key]
        if type(value) is not type(example_value) or (type(value) is int and value < 1):
            raise ValueError(f"{suite}: {key}={value!r} must be like {example_value!r}, and positive")
    return found.build(shape, dtype, device)
