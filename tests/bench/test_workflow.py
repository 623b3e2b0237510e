"""Test that workflows for users to copy call commands and options that exist."""

import re
from pathlib import Path

import pytest

from clipfast.bench import checkout
from clipfast.cli.main import main

FOLDER = Path(checkout.ROOT, "bench", "ci")


def test_commands_options_and_targets_exist(capsys):
    commands = re.findall(r"clipfast ((?:bench )?\w+) (--.*)", (FOLDER / "github-gpu.yml").read_text())
    assert [command for command, _ in commands] == ["verify", "bench ops"]
    for command, arguments in commands:
        with pytest.raises(SystemExit, match="0"):
            main([*command.split(), "--help"])
        help_text = capsys.readouterr().out
        assert [option for option in re.findall(r"--[\w-]+", arguments) if option not in help_text] == []
    targets = re.findall(r"run: make (\S+)", (FOLDER / "github-cpu.yml").read_text())
    assert targets == ["lint", "test"]
    assert all(re.search(rf"^{target}:", Path(checkout.ROOT, "Makefile").read_text(), re.M) for target in targets)
