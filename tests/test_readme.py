"""Every snippet of the README and of docs/ runs, and every command of the README, docs/data.md and docs/plan.md."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from clipfast.cli import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = [
    pytest.param(snippet, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
PAGES = [ROOT / "docs" / name for name in ("data.md", "plan.md")]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", TEXT + "".join(page.read_text() for page in PAGES), re.DOTALL)
    for line in block.splitlines()
]
# Two steps instead of a thousand, one plan instead of three, and one compiled function instead of several, by what says
# how many there are.
SHORT = {
    "--recipe": ["--epochs", "1", "--train-num-samples", "64", "--batch-size", "32"],
    "--samples-seen": ["--samples-seen", "64", "--batch-size", "32"],
    "--fit": ["--checkpointing", "none"],
    "--smoke": ["--only", "clipfast", "PyTorch compiled"],
}


def shortened(arguments):
    return [*arguments, *next((options for flag, options in SHORT.items() if flag in arguments), [])]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "snippet", "exec"), {})


def test_commands(tmp_path, monkeypatch, capsys):
    programs = {command[0] for command in COMMANDS}
    assert programs == {"make", "clipfast", "pip", "python", "pytest"}
    monkeypatch.chdir(tmp_path)
    for program, *arguments in COMMANDS:
        if program == "clipfast" and arguments[0] != "verify":
            assert main(shortened(arguments)) == 0, capsys.readouterr().err


def test_verify_command():
    """Its legs have tests of their own, and take a minute: here, the command as it is written, for one op."""
    (command,) = [arguments for program, *arguments in COMMANDS if program == "clipfast" and arguments[0] == "verify"]
    assert main([*command, "--op", "patch_embed"]) == 0


@pytest.mark.parametrize("program", ["python", "pytest"])
def test_commands_in_the_checkout(program):
    commands = [arguments for name, *arguments in COMMANDS if name == program]
    start = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest"]}[program]
    assert commands
    for arguments in commands:
        done = subprocess.run([*start, *shortened(arguments)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_make_targets():
    expected = {
        "train": "clipfast train --recipe emoji", "train-shapes": "clipfast eval compositional", "test": "pytest",
        "gpu": "-m bench.gpu --out runs/gpu --stub",
    }  # fmt: skip
    targets = [arguments for program, *arguments in COMMANDS if program == "make"]
    assert sorted(target for target, *_ in targets) == sorted(expected)
    for target in targets:
        plan = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected[target[0]] in plan.stdout


def test_ci_runs_the_readmes_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_extras_hold_what_make_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = re.findall(r"'\.\[(.*?)\]'", (ROOT / "Makefile").read_text() + TEXT)
    assert installed
    for names in installed:
        assert set(names.split(",")) <= set(extras)
