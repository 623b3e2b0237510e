"""The workflow that users copy calls commands that exist, with options that they have."""

import re
from pathlib import Path

import pytest

from clipfast.bench import checkout
from clipfast.cli import main

yaml = pytest.importorskip("yaml")
WORKFLOW = Path(checkout.ROOT, "bench", "ci", "github-gpu.yml").read_text()
COMMANDS = re.findall(r"clipfast ((?:bench )?\w+)(.*)", "\n".join(
    step.get("run", "") for job in yaml.safe_load(WORKFLOW)["jobs"].values() for step in job["steps"]
))  # fmt: skip


def test_there_are_the_two_that_matter():
    assert [command for command, _ in COMMANDS] == ["verify", "bench ops"]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_options_exist(command, arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    help_text = capsys.readouterr().out
    options = re.findall(r"--[\w-]+", arguments)
    assert options
    assert [option for option in options if option not in help_text] == []


def test_the_one_for_cpus_calls_targets_that_exist():
    folder = Path(checkout.ROOT, "bench", "ci")
    targets = re.findall(r"run: make (\S+)", (folder / "github-cpu.yml").read_text())
    assert targets == ["lint", "test"]
    assert all(re.search(rf"^{target}:", Path(checkout.ROOT, "Makefile").read_text(), re.M) for target in targets)
