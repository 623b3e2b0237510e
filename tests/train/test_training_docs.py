"""Every command of docs/training.md runs, with a tiny model and two processes."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from clipfast.cli.main import main

from ..processes import run_ranks
from ..small_runs import NAFLEX, TINY, sample, write_shard

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
(SCRIPT,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SMALL = "data/000.tar"
FEWER = {"--batch-size": "8", "--global-batch-size": "16", "--micro-batch-size": "4", "--warmup": "1"}


def shortened(arguments):
    """Change the arguments of a training command to a tiny model, small batches and two steps."""
    given = list(arguments)
    for flag, value in (*FEWER.items(), ("--model", TINY), ("--remote-sync", f"file://{Path.cwd()}/copies")):
        if flag in given:
            given[given.index(flag) + 1] = value
    if "--samples-seen" in given:
        given[given.index("--samples-seen") + 1] = "32"
    elif "--print-config" not in given and "--resume" not in given:
        given += ["--samples-seen", "32"]
    if "--recipe" in given and "--print-config" not in given:
        given += ["--global-batch-size", "16"]
    if "--use-naflex" in given:
        given[given.index("--model") + 1] = NAFLEX
        given += ["--naflex-max-tokens-per-batch", "1024"]
    if "emoji" in given:
        given += ["--val-data", SMALL, "--val-leave-out", "odd"]
    return given


def smaller(arguments):
    """Change a command of docs/training.md other than ``clipfast train`` to a small model and few images."""
    changes = {"ViT-B-32": "ViT-T-8-32", "bundled:emoji/noto": SMALL, "bundled:emoji/fluent": "data/001.tar"}
    return [changes.get(word, word) for word in arguments]


def as_rank(rank, folder, commands):
    """Run training commands as one of the processes of torchrun, and return their errors."""
    os.chdir(folder)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, 2, 2)), strict=True)))
    found = []
    for arguments in commands:
        drawing = mock.patch("clipfast.train.loop._pictures", return_value=[])
        with drawing, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                code = main(arguments)
            except SystemExit as ended:  # another rank prints the reason of the exit
                code = ended.code
        found.append(errors.getvalue() if code else "")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the data that docs/training.md names."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "data").mkdir()
    for number in range(4):
        write_shard(folder / "data" / f"{number:03}.tar", [sample(12 * number + index) for index in range(12)])
    yield folder
    shutil.rmtree(folder)  # the folder holds the checkpoints of many runs


@pytest.mark.long
def test_commands(folder, monkeypatch, capsys):
    """The commands of docs/training.md run in their order, but torchrun's first, since some use results of others.

    Among these two dozen commands are ten training runs, so the test takes more than 12 seconds.
    """
    monkeypatch.chdir(folder)
    together = []
    for arguments in (arguments for program, *arguments in COMMANDS if program == "torchrun"):
        start = arguments.index("--") + 1
        assert arguments[2:start] == ["-m", "clipfast", "--"]
        given = shortened(arguments[start:])
        # daemonic processes of the test cannot start data workers
        together.append(given if "--resume" in given else [*given, "--workers", "0"])
    (folder / "ranks").mkdir()
    found = run_ranks(as_rank, 2, str(folder), together, folder=folder / "ranks", timeout=600.0)
    assert found == [[""] * len(together)] * 2
    for program, *arguments in COMMANDS:
        if program != "torchrun":
            assert program == "clipfast"
            given = (shortened if arguments[0] == "train" else smaller)(arguments)
            assert main(given) == 0, (shlex.join(arguments), capsys.readouterr().err)
    runs = {path.name for path in (folder / "runs").iterdir()}
    assert runs >= {"demo", "eight", "sharded", "kept", "finetuned", "lit", "shapes"}


@pytest.mark.long
def test_the_script_for_slurm(folder):
    """The script for Slurm trains on two processes, with stand-ins for ``srun`` and ``scontrol``."""
    tools = folder / "tools"
    tools.mkdir()
    for name, line in (
        ("srun", 'exec "$@"'), ("scontrol", "echo localhost"),
        ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"'),
    ):  # fmt: skip
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    script = SCRIPT.replace("--model ViT-B-32", f"--model {TINY} --device cpu").replace("amp_bf16", "fp32")
    script = script.replace("32768", "16 --samples-seen 64 --warmup 1").replace(
        "29500", str(29500 + os.getpid() % 1000)
    )
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a",
        "GPUS": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["bash", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "months" / "results.json").exists()
