"""``python -m clipfast.bench.adoption.trainer``: OpenCLIP's own trainer, through ``clipfast.run`` and without.

Both train the same small model on the bundled pairs, in float32 on CPUs, and take turns. They have to print the same
losses. Time is CPU time, since a machine may do other things at the same time.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import clipfast

SHARDS = [Path(clipfast.__file__).parent / "assets" / "emoji" / f"{style}.tar.gz" for style in ("fluent", "noto")]
# A text and an image tower of six blocks each, as wide as those of ViT-T.
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "layers": 6, "width": 192, "head_width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 6},
}
# Runs the trainer once for each list of options, so that Python and PyTorch start once, and prints what was measured.
# Without a buffer, their loader does not shuffle, which it does by the clock. Their DistributedDataParallel names
# devices, which CPUs may not have. Layers of bitsandbytes need a GPU.
PROGRAM = """
import json, logging, resource, sys, time, types
import open_clip, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from open_clip_train import data, main
open_clip.add_model_config("models")
data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1
class OnCPU(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)
torch.nn.parallel.DistributedDataParallel = OnCPU
class OtherLinear(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)
layers = types.SimpleNamespace(triton_based_modules=types.SimpleNamespace(OtherLinear=OtherLinear))
sys.modules["bitsandbytes"] = types.SimpleNamespace(nn=layers)
times = []
register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
for options in json.loads(sys.argv[1]):
    logging.getLogger().handlers.clear()
    main.main(options)
    torch.distributed.init_process_group = lambda **options: None  # once for all runs
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
measured = {"version": open_clip.__version__, "times": times, "peak": peak, "all": time.process_time()}
sys.stdout.write("measured " + json.dumps(measured) + chr(10))
"""
WARM_UP = 5  # steps that are not timed


class Run(NamedTuple):
    """The losses that a training printed, and the time and memory that it needed."""

    version: str  # of OpenCLIP
    losses: list[list[tuple[str, str]]]
    seconds: list[float]  # CPU time of each step, the slowest rank's
    all_seconds: float  # CPU time of all ranks, from the start of Python to the end
    peak: int  # bytes of resident memory, of the largest rank


def prepare(folder: Path, models: dict[str, Any]) -> None:
    """Write the program and the configurations of models into a folder."""
    (folder / "trainer.py").write_text(PROGRAM)
    (folder / "models").mkdir()
    for name, config in models.items():
        (folder / "models" / f"{name}.json").write_text(json.dumps(config))
    stand_in_for_pandas(folder)


def stand_in_for_pandas(folder: Path) -> None:
    """Write an empty ``pandas`` if there is none: OpenCLIP's trainer imports it, and needs it for CSV files only."""
    if importlib.util.find_spec("pandas") is None:
        (folder / "pandas.py").touch()


def options(model: str, name: str, logs: str, *, steps: int, batch: int, ranks: int = 1) -> list[str]:
    """Return the options of OpenCLIP's trainer; it logs each step in the folder ``logs``/``name``."""
    return [
        "--model", model, "--train-data", "::".join(map(str, SHARDS)), "--dataset-type", "webdataset",
        "--train-num-samples", str(steps * batch * ranks), "--batch-size", str(batch), "--epochs", "1", "--lr", "1e-4",
        "--warmup", "1", "--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1", "--logs", logs,
        "--name", name, "--save-frequency", "0", "--workers", "0",
    ]  # fmt: skip


def command(ranks: int, *, ours: bool) -> list[str]:
    """Return the arguments of Python that run the program, up to its own."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [*start, "-m", *(["clipfast.run"] if ours else []), "trainer"]


def printed_losses(folder: Path) -> dict[str, list[list[tuple[str, str]]]]:
    """Return the losses that each run in ``folder`` has logged, as they are printed: a list for each step."""
    found = {}
    for path in folder.glob("*/out.log"):
        lines = [line for line in path.read_text().splitlines() if "Train Epoch" in line]
        found[path.parent.name] = [re.findall(r"(\w*[Ll]oss): (\S+)", line) for line in lines]
    return found


def train(*, ours: bool, ranks: int, steps: int, batch: int) -> Run:
    """Train in processes of their own, with one thread each.

    Raises:
        RuntimeError: the training fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, {"small": SMALL})
        given = options("small", "run", "logs", steps=steps, batch=batch, ranks=ranks)
        # Freed tensors go back to the system at once (mallopt(3)), so that resident memory is memory in use.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        environment.pop("RANK", None)
        call = [sys.executable, *command(ranks, ours=ours), json.dumps([given])]
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True)
        found = [json.loads(text) for text in re.findall(r"measured (\{.*\})", done.stdout)]
        if done.returncode != 0 or len(found) != ranks:
            raise RuntimeError(f"{' '.join(call)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        losses = printed_losses(folder / "logs")["run"]
    seconds = [[after - before for before, after in itertools.pairwise(each["times"])] for each in found]
    return Run(
        version=found[0]["version"],
        losses=losses,
        seconds=[max(step) for step in zip(*seconds, strict=True)][WARM_UP - 1 :],
        all_seconds=sum(each["all"] for each in found),
        peak=max(each["peak"] for each in found),
    )


def row(ranks: int, theirs: Sequence[Run], ours: Sequence[Run]) -> str:
    """Return a row of the table: what a quarter of the steps and trainings stay below, since other work only adds."""
    step, whole, peak = (
        [lower_quartile([figure for run in runs for figure in figures(run)]) for runs in (theirs, ours)]
        for figures in (lambda run: run.seconds, lambda run: [run.all_seconds], lambda run: [run.peak / 2**20])
    )
    equal, steps = count_equal([*theirs, *ours]), len(ours[0].losses)
    cells = [
        ours[0].version, str(ranks), f"{equal} of {steps}", f"{step[0]:.3f}", f"{step[1]:.3f}",
        f"{step[0] / step[1]:.2f}", f"{whole[0]:.1f}", f"{whole[1]:.1f}", f"{peak[0]:.0f}", f"{peak[1]:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def lower_quartile(figures: Sequence[float]) -> float:
    """Return the smallest figure that at least a quarter of ``figures`` do not exceed."""
    return sorted(figures)[(len(figures) - 1) // 4]


def count_equal(runs: Sequence[Run]) -> int:
    """Return the number of steps of which all runs printed the same losses, at least one each."""
    steps = itertools.zip_longest(*(run.losses for run in runs))
    return sum(bool(first) and all(each == first for each in others) for first, *others in steps)


HEAD = (
    "| OpenCLIP | ranks | steps with equal losses | CPU s of a step | with clipfast | times faster "
    "| CPU s of all | with clipfast | peak MiB of a rank | with clipfast |"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and return 0 if all printed losses are equal, else 1."""
    parser = argparse.ArgumentParser(prog="python -m clipfast.bench.adoption.trainer", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default: 1 2)")
    parser.add_argument("--steps", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=16, help="pairs of a rank (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each kind, in turns (default: %(default)s)")
    args = parser.parse_args(argv)
    smallest = {"--ranks": min(args.ranks), "--batch": args.batch, "--rounds": args.rounds}
    if min(smallest.values()) < 1 or args.steps <= WARM_UP:
        given = ", ".join(f"{name} {number}" for name, number in smallest.items())
        parser.error(f"each must be at least 1 and --steps more than {WARM_UP}, got {given}, --steps {args.steps}")
    print(HEAD, "|---" * HEAD.count(" |") + "|", sep="\n")
    all_equal = True
    for ranks in args.ranks:
        runs: dict[bool, list[Run]] = {False: [], True: []}
        for _ in range(args.rounds):
            for ours in (True, False):
                runs[ours].append(train(ours=ours, ranks=ranks, steps=args.steps, batch=args.batch))
        print(row(ranks, runs[False], runs[True]), flush=True)
        all_equal &= count_equal([*runs[False], *runs[True]]) == args.steps
    return 0 if all_equal else 1


if __name__ == "__main__":
    sys.exit(main())
