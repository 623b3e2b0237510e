"""A run of the checks: what to check, where, in which order, and how the rows get out.

``run_verify`` is the whole of it as a function; ``iter_groups`` streams the rows of one case after the other.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..kernels._launch import INTERPRET
from ..models import list_models
from . import curve, shapes
from . import models as model_checks
from . import ops as op_checks
from .child import groups_of_child
from .report import Row, write_json, write_junit
from .shapes import CPU, CUDA, INTERPRETER

OPS = (*op_checks.OPS, model_checks.MODEL, curve.CURVE)
DEFAULT_MODEL = "ViT-T-8-32"
DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"} | {name: name for name in op_checks.DTYPES}
HANG_SECONDS = 300.0  # without a row, after which the interpreter counts as hung

NO_GPU = "no CUDA GPU here: the native kernels were not run"
BF16_INTERPRETED = "Triton's interpreter multiplies bfloat16 as raw bits: only a GPU can run the kernels in it"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to verify. Each list is checked here.

    Args:
        ops: of ``OPS``: the three ops, "model" and "curve".
        models: names that :func:`clipfast.list_models` has.
        dtypes: "float32", "float16", "bfloat16", or "fp32", "fp16", "bf16".
        against: "openclip", "hf"; None compares with OpenCLIP where it is installed.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        quick: fewer cases, for a minute.
        legs: only these of ``LEGS``; None for those of the device.
        hang_seconds: how long the subprocess may be silent.

    Raises:
        ValueError: an unknown name; the message lists what is known.
        RuntimeError: a device or a package that is asked for and is not there.
    """

    ops: tuple[str, ...] = OPS
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    dtypes: tuple[str, ...] = tuple(op_checks.DTYPES)
    against: tuple[str, ...] | None = None
    device: str = "auto"
    quick: bool = False
    legs: tuple[str, ...] | None = None
    hang_seconds: float = HANG_SECONDS

    def __post_init__(self) -> None:
        _known("--op", self.ops, OPS)
        _known("--dtype", self.dtypes, tuple(DTYPE_NAMES))
        _known("--model", self.models, tuple(list_models()))
        _known("--against", self.against or (), tuple(model_checks.PEERS))
        _known("--device", (self.device,), ("auto", "cpu", "cuda"))
        _known("legs", self.legs or (), shapes.LEGS)
        object.__setattr__(self, "dtypes", tuple(dict.fromkeys(DTYPE_NAMES[name] for name in self.dtypes)))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("--device cuda: PyTorch sees no CUDA GPU here")
        for peer in self.against or ():
            if not model_checks.installed(peer):
                raise RuntimeError(f"--against {peer}: not installed; pip install {model_checks.PEERS[peer][1]}")

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run natively."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what ``Options(**raw)`` takes, tuples as lists."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Options":
        """Inverse of :meth:`to_dict`."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def _known(flag: str, given: Iterable[str], known: tuple[str, ...]) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{flag}: unknown {', '.join(map(repr, unknown))}; known: {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class Check:
    """Something to run: the rows it gives, and what its row says where it raises."""

    template: Row
    rows: Callable[[], list[Row]]


def here() -> str:
    """The leg of CPU tensors in this process, which Triton fixed when it was imported."""
    return INTERPRETER if INTERPRET else CPU


def legs_of(options: Options) -> tuple[str, ...]:
    """Legs to run, in order."""
    if options.legs is not None:
        return options.legs
    return (CUDA,) if options.on_gpu else (CPU, INTERPRETER)


def checks(options: Options, leg: str) -> list[Check]:
    """Everything that runs on ``leg``; the interpreter is too slow for models and training."""
    dtypes = [name for name in options.dtypes if not (leg == INTERPRETER and name == "bfloat16")]
    found = []
    for op in options.ops:
        if op in op_checks.OPS:
            found += [
                Check(
                    Row(op, leg, case.check, case.name, dtype, why=case.why),
                    lambda op=op, case=case, dtype=dtype: op_checks.verify_case(
                        op, leg, case, dtype, quick=options.quick
                    ),
                )
                for case, dtype in op_checks.planned(
                    op, leg, {name: op_checks.DTYPES[name] for name in dtypes}, quick=options.quick
                )
            ]
        elif leg != INTERPRETER:
            found += (
                _model_checks(options, leg, dtypes) if op == model_checks.MODEL else _curve_checks(options, leg, dtypes)
            )
    return found


def _model_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    peers = [
        model_checks.MODEL,
        *(options.against or ([model_checks.OPENCLIP] if model_checks.installed(model_checks.OPENCLIP) else [])),
    ]
    return [
        Check(
            Row(peer, leg, shapes.ACCURACY, name, dtype),
            lambda peer=peer, name=name, dtype=dtype: model_checks.verify_model(peer, name, leg, dtype),
        )
        for peer in peers
        for name in options.models
        for dtype in dtypes[: 1 if options.quick else None]
    ]


def _curve_checks(options: Options, leg: str, dtypes: list[str]) -> list[Check]:
    """Float32 everywhere; bfloat16 autocast on a GPU, or where it is asked for alone: a CPU takes minutes."""
    wanted = [] if options.quick and leg == CPU else [name for name in dtypes if name != "float16"]
    if leg == CPU and "float32" in wanted:
        wanted = ["float32"]
    return [
        Check(
            Row(curve.CURVE, leg, "training", curve.MODEL_NAME, dtype),
            lambda dtype=dtype: curve.verify_curve(leg, dtype),
        )
        for dtype in wanted
    ]


def not_run(options: Options) -> list[Row]:
    """What cannot be run here, as rows that are skipped."""
    legs, rows = legs_of(options), []
    if CUDA not in legs and options.legs is None:
        rows.append(Row("legs", CUDA, "leg", "native kernels", reason=NO_GPU if not torch.cuda.is_available() else
                        "--device cpu: the native kernels were not run"))  # fmt: skip
    if options.legs is None and CUDA in legs:
        reason = "runs with --device cpu"
        rows += [Row("legs", leg, "leg", name, reason=reason) for leg, name in
                 ((CPU, "PyTorch paths"), (INTERPRETER, "interpreted kernels"))]  # fmt: skip
    if INTERPRETER in legs and "bfloat16" in options.dtypes:
        rows.append(Row("legs", INTERPRETER, "leg", "kernels in bfloat16", "bfloat16", reason=BF16_INTERPRETED))
    asks_openclip = model_checks.MODEL in options.ops and options.against is None
    if asks_openclip and not model_checks.installed(model_checks.OPENCLIP):
        reason = f"OpenCLIP is not installed: pip install {model_checks.PEERS[model_checks.OPENCLIP][1]}"
        rows.append(Row(model_checks.OPENCLIP, legs[0], shapes.ACCURACY, ", ".join(options.models), reason=reason))
    if options.quick and curve.CURVE in options.ops and CPU in legs:
        rows.append(Row(curve.CURVE, CPU, "training", curve.MODEL_NAME, "float32", reason="left out by --quick"))
    return rows


def number_of_groups(options: Options) -> int:
    """How many groups :func:`iter_groups` gives when all goes well."""
    return sum(len(checks(options, leg)) for leg in legs_of(options))


def iter_groups(options: Options) -> Iterator[list[Row]]:
    """The rows of one check after the other. A check that raises is a row that fails; nothing is raised for it.

    Raises:
        ValueError: options that leave nothing to check.
    """
    if number_of_groups(options) == 0:
        raise ValueError("these options leave nothing to check: bfloat16 needs the CPU paths or a GPU, as do models")
    for leg in legs_of(options):
        if leg in (CUDA, here()):
            for check in checks(options, leg):
                yield op_checks.timed(check.rows, check.template)
        elif checks(options, leg):
            child = dataclasses.replace(options, legs=(leg,), device="cpu")
            yield from groups_of_child(child.to_dict(), leg, options.hang_seconds)
    skipped = not_run(options)
    if skipped:
        yield skipped


def run_verify(
    options: Options,
    *,
    json_path: Path | None = None,
    junit_path: Path | None = None,
    on_group: Callable[[list[Row]], None] | None = None,
    rows: list[Row] | None = None,
) -> list[Row]:
    """Run all checks.

    Args:
        options: what to verify.
        json_path: rewritten after every case, so that a kill at any moment leaves the rows so far; ``complete`` in it
            is true at the end only.
        junit_path: written at the end, also of an interrupted run.
        on_group: called with the rows of each case.
        rows: appended to as they come, for a caller that survives an interruption.

    Returns:
        All rows; ``clipfast.verify.exit_code`` says what they come to.
    """
    rows = [] if rows is None else rows
    raw, complete = options.to_dict(), False
    if json_path is not None:
        write_json(json_path, rows, raw, complete=False)
    try:
        for group in iter_groups(options):
            rows += group
            if on_group is not None:
                on_group(group)
            if json_path is not None:
                write_json(json_path, rows, raw, complete=False)
        complete = True
    finally:
        if json_path is not None:
            write_json(json_path, rows, raw, complete=complete)
        if junit_path is not None:
            write_junit(junit_path, rows)
    return rows
