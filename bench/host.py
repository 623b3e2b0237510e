"""The time that the host takes for an op, for a whole step, and for one encoded image or text.

A GPU waits for its host where kernels are short. Inputs are so small that nothing but the code that leads to the
kernels takes time; models have the depth of a published one, a width of 64 and few tokens. Times are CPU time of one
thread, in microseconds: medians of samples that the candidates take in turns. Before a sample, its candidate is called
once without being timed. "forward" is a call that needs no gradients, "both" a call with its backward pass. "kernels"
counts the kernels that would start on a GPU: launches of Triton, and PyTorch's ops that are neither views nor
allocations.

--json writes the figures and the conditions to a file. ``clipfast inspect --predict``, the tables of the documentation
and the gates read such files.

With --stub, Triton's own launcher starts the kernels on a driver that runs nothing. With a CUDA build of PyTorch, all
tensors are CUDA tensors then, and PyTorch's kernels start there too; otherwise PyTorch's ops run on the CPU.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from clipfast import add_model_config, get_model_config
from clipfast.cli.arguments import COUNT, add_output
from clipfast.io.files import replace_text
from clipfast.kernels.dtypes import DTYPES
from clipfast.kernels.hardware import ARCHITECTURES
from clipfast.kernels.launch import record_launches
from clipfast.kernels.spec import Draw, OpSpec, Shape, specs
from clipfast.verify.models import draw_batch

from . import machine, results
from .case import OURS, AnyFunction, Candidate, Case, Sizes, call
from .harness import Budget, Timing, leaves, measure
from .stub import driver, walk
from .stub.build import missing_tool
from .stub.counts import ARCH, Ops
from .stub.gpu import MARK, gpu_environment
from .suites import ops, rivals, step

M_PERTURB = -6  # the option of mallopt(3) that fills new memory with the complement of a byte
PASSES = ("forward", "both")
WIDTH, CONTEXT, VOCABULARY = 64, 8, 64  # sizes of the narrow models that are measured
LINE = "  {:26} {:>9} {:>9} {:>9} {:>9}   {}"
# Our candidate is compared with the first of these that can run.
THEIRS = ("SDPA", "OpenCLIP", "PyTorch")


class Row(NamedTuple):
    """The two measured cases of one computation: a call that needs no gradients, and a call with its backward pass."""

    name: str  # the op, "step", "encode_image" or "encode_text"
    shape: Sizes  # "model" names the published model that is as deep as the measured one
    forward: Case | None
    both: Case | None

    @property
    def title(self) -> str:
        """Return the name of the measured op or step and its sizes, in one line of the host's table."""
        return " ".join([self.name, *(f"{size}={value}" for size, value in self.shape.items())])


class HostTime(NamedTuple):
    """The median time of the host for a candidate's call, and the number of kernels that the call starts."""

    us: float
    kernels: int


# The host's times by the name of the candidate; a string says why a candidate has none.
Findings = dict[str, HostTime | str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench host``, the benchmark of the host's time."""
    add = parser.add_argument
    add("--stub", action="store_true", help="let Triton's launcher start the kernels on a driver that runs nothing")
    add("--dtype", choices=tuple(DTYPES), help="dtype of ops and of models' autocast (default: fp32; bf16 on the stub)")
    add("--op", nargs="*", metavar="OP", help="measure these ops; with no name, no op (default: all)")
    models = "models whose depth steps have; with no name, no model (default: ViT-B-32)"
    add("--model", nargs="*", default=["ViT-B-32"], metavar="NAME", help=models)
    add("--rounds", type=COUNT, default=15, help="number of samples of each candidate (default: 15)")
    add_output(parser, "--json", is_held=False, help="write the figures and the conditions to FILE too")


def run(args: argparse.Namespace) -> int:
    """Print the table of the host's time, row by row as it is measured."""
    on_gpu = torch.cuda.is_available()
    if args.stub and not on_gpu and torch.version.cuda is not None:
        options = ["--rounds", str(args.rounds), "--model", *args.model]
        options += [] if args.op is None else ["--op", *args.op]
        options += [] if args.dtype is None else ["--dtype", args.dtype]
        options += [] if args.json is None else ["--overwrite", "--json", str(args.json)]
        command = [sys.executable, "-m", "clipfast.bench", "host", *options]
        return subprocess.run(command, env=gpu_environment(), check=False).returncode
    is_stub = args.stub and not on_gpu
    if is_stub and (missing := missing_tool()):
        raise ValueError(f"--stub: {missing}")
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = args.dtype or ("bf16" if on_gpu or is_stub else "fp32")
    place = torch.cuda.get_device_name() if on_gpu else f"CPU tensors ({MARK})" if is_stub else "CPU tensors"
    print(f"{place}, {dtype}: CPU time of the host in microseconds per call, median of {args.rounds} rounds\n")
    print(LINE.format("", "forward", "x theirs", "both", "x theirs", "kernels"))
    lines = []
    with undisturbed(), _on_stub() if is_stub else contextlib.nullcontext():
        for row in rows(args.op, args.model, dtype, device):
            cases = row.forward, row.both
            passes = [_measured(case, args.rounds, takes_all=is_stub) if case else {} for case in cases]
            print("\n".join([row.title, *_lines(passes)]), flush=True)
            lines.append(json.dumps(_to_json(row, passes)))
    if args.json:
        record = results.conditions(device) | {"place": place, "dtype": dtype, "rounds": args.rounds}
        head, body = json.dumps(record).removesuffix("}"), ",\n".join(lines)
        replace_text(args.json, f'{head}, "rows": [\n{body}\n]}}\n')
    return 0


def rows(names: Sequence[str] | None, models: Sequence[str], dtype: str, device: torch.device) -> Iterator[Row]:
    """Yield the rows of the host's table: ops at their small shapes, and narrow models as deep as ``models``."""
    known = specs()
    for name in known if names is None else names:
        if name not in known:
            raise ValueError(f"--op: there is no op {name!r}: choose from {', '.join(known)}")
        for shape in known[name].small:
            yield _row_of_op(known[name], shape, dtype, device)
    for name in models:
        yield from _rows_of_model(name, dtype, device)


def _row_of_op(spec: OpSpec, shape: Shape, dtype: str, device: torch.device) -> Row:
    """Return the row of the host's table for an op at a shape."""
    case = ops.build(spec, shape.to_dict(), dtype, device)
    kept = [one for one in case.candidates if "compiled" not in one.name and not one.name.startswith("SDPA")]
    # SDPA takes no lengths. It runs without the context that chooses a backend, which takes time of its own.
    if spec.name == "attention" and not {"lengths", "varlen"} & shape.to_dict().keys():
        options = spec.call(shape, "", Draw(device="meta", empty=True), DTYPES[dtype]).options
        kept.append(Candidate("SDPA", lambda: rivals.sdpa(None, options["num_heads"], options.get("causal", False))))
    case = dataclasses.replace(case, candidates=tuple(kept))
    forward = dataclasses.replace(case, wants_grad=())
    return Row(spec.name, shape.to_dict(), forward, case if case.wants_grad else None)


def _rows_of_model(name: str, dtype: str, device: torch.device) -> Iterator[Row]:
    """Yield the rows of the host's table for a narrow model as deep as the model ``name``.

    They are a training step of two pairs, and the encoding of one image and of one text.
    """
    narrow = _narrow(name)
    case = step.build({"model": narrow, "batch": 2}, dtype, device)
    kept = tuple(one for one in case.candidates if one.name in (OURS, "PyTorch", "OpenCLIP"))
    yield Row("step", {"model": name, "batch": 2}, None, dataclasses.replace(case, candidates=kept))
    images, texts = draw_batch(get_model_config(narrow), 1)
    for kind, x in (("image", images.float() / 255), ("text", texts)):
        encoding = dataclasses.replace(
            case, op="encode", inputs=functools.partial(dict, x=x.to(device)), gate_inputs=None,
            candidates=tuple(dataclasses.replace(one, make=_encoder(one, kind)) for one in kept),
        )  # fmt: skip
        yield Row(f"encode_{kind}", {"model": name, "batch": 1}, encoding, None)


def _encoder(candidate: Candidate, kind: str) -> Any:
    """Return ``make`` of a candidate that encodes images or texts by the model of a candidate for the training step."""

    def make() -> AnyFunction:
        """Return the function that encodes images or texts by the benchmarked model, to time its host."""
        measured: Any = candidate.make()
        model = getattr(measured.model, "model", measured.model).eval()
        encode = getattr(model, f"encode_{kind}")

        @torch.no_grad()
        def run(x: Tensor) -> Tensor:
            """Encode images or texts by the benchmarked model, to time its host."""
            with torch.autocast(x.device.type, DTYPES[measured.dtype], enabled=measured.dtype != "fp32"):
                features: Tensor = encode(x)
            return features

        return run

    return make


def _narrow(name: str) -> str:
    """Register a model with the depth of the model ``name``, of little width and with few tokens; return its name."""
    config = get_model_config(name)
    if not isinstance(config.vision.layers, int):
        raise ValueError(f"--model: {name} has a ResNet, whose convolutions take a CPU longer than the host's code")
    patch = config.vision.patch_size
    vision = dataclasses.replace(config.vision, width=WIDTH, head_width=WIDTH, image_size=2 * (patch or 1))
    text = dataclasses.replace(config.text, width=WIDTH, heads=1, context_length=CONTEXT, vocab_size=VOCABULARY)
    narrow = dataclasses.replace(config, embed_dim=WIDTH, vision=vision, text=text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}-of-width-{WIDTH}.json"
        path.write_text(json.dumps(narrow.to_dict()))
        add_model_config(path)
    return path.stem


def _lines(passes: Sequence[Findings]) -> list[str]:
    """Return the lines of a row of the host's table, one for each candidate, from the times for each pass."""
    lines = []
    for name in dict.fromkeys(name for found in passes for name in found):
        mine = [found.get(name) for found in passes]
        refused = next((one for one in mine if isinstance(one, str)), None)
        cells = [cell for one, found in zip(mine, passes, strict=True) for cell in _cells(one, found)]
        counts = " / ".join(str(one.kernels) for one in mine if isinstance(one, HostTime))
        lines.append(f"  {name:26} {refused[:90]}" if refused else LINE.format(name, *cells, counts))
    return lines


def _cells(one: HostTime | str | None, found: Findings) -> tuple[str, str]:
    """Return two cells of the host's table: a candidate's time, and its ratio to the time of :func:`compared`."""
    if not isinstance(one, HostTime):
        return "", ""
    theirs = found.get(compared(found))
    return f"{one.us:.1f}", f"{one.us / theirs.us:.2f}" if isinstance(theirs, HostTime) else ""


def compared(found: Findings) -> str:
    """Return the name of the candidate with which the host's time is compared, or an empty text if there is none."""
    return next((name for name in THEIRS if isinstance(found.get(name), HostTime)), "")


def _to_json(row: Row, passes: Sequence[Findings]) -> dict[str, Any]:
    """Return the host's times in a row as JSON, without the candidates that were refused."""
    found: dict[str, dict[str, HostTime]] = {}
    for kind, findings in zip(PASSES, passes, strict=True):
        for name, one in findings.items():
            if isinstance(one, HostTime):
                found.setdefault(name, {})[kind] = one
    against = next(filter(None, map(compared, passes)), "")
    return {"name": row.name, "shape": row.shape, "against": against, "found": found}


def _measured(case: Case, rounds: int, *, takes_all: bool) -> Findings:
    """Measure the host's time for the candidates of a case, which take turns."""
    case = prepared(case, takes_all=takes_all)
    return {
        timing.candidate.name: timing.refused
        or HostTime(round(1e6 * statistics.median(timing.samples), 1), _kernels(case, timing))
        for timing in timings(case, rounds)
    }


def prepared(case: Case, *, takes_all: bool = False) -> Case:
    """Return a benchmark case whose samples are the time of the host.

    With ``takes_all``, kernels that need a GPU run too, since their launches go to the stub.
    """
    candidates = tuple(dataclasses.replace(one, needs_gpu=one.needs_gpu and not takes_all) for one in case.candidates)
    return dataclasses.replace(case, candidates=candidates, reference=None, graph=False, clock=time.process_time)


def timings(case: Case, rounds: int) -> list[Timing]:
    """Return the samples of a prepared case's candidates, which take turns."""
    return measure(case, Budget(math.inf, rounds, rounds))[0]


def _kernels(case: Case, timing: Timing) -> int:
    """Count the kernels that a call would start on a GPU: clipfast's and other libraries' Triton kernels, and one for
    each PyTorch op.
    """
    inputs = leaves(case, case.inputs())
    with (
        record_launches(ARCH, ARCHITECTURES[ARCH].multiprocessors) as launches,
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as others,
        Ops() as found,
    ):
        call(case, timing.candidate, timing.function, inputs)
    return len(launches) + others.call_count + found.count


@contextlib.contextmanager
def _on_stub() -> Iterator[None]:
    """Let CPU tensors pass for tensors of a GPU: the driver stub says of every address that its GPU owns it.

    No kernel runs, so results are never written. An op may use such a result as indices, so the C library fills memory
    with zeros when it is allocated.
    """
    stub, libc = driver.load(ARCH), ctypes.CDLL(None)
    with driver.on_device(stub), walk.in_blocks():
        stub.library.stub_own(1, 2**63, 0)
        libc.mallopt(M_PERTURB, 255)
        try:
            yield
        finally:
            libc.mallopt(M_PERTURB, 0)
            stub.library.stub_disown_all()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let PyTorch use one thread, and take denormal numbers for zero.

    On the driver stub no kernel runs, so a result has the values that its memory held before. These may be denormal
    numbers, which would slow down PyTorch's ops on the CPU.
    """
    with machine.one_thread():
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
