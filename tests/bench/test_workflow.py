"""Test that workflows for users to copy call commands and options that exist."""

import re
from pathlib import Path

import pytest

from clipfast.bench import checkout
from clipfast.cli.main import main


@pytest.mark.parametrize("file", ["bench/ci/github-gpu.yml", "bench/ci/gitlab.yml", "docs/ci.md"])
def test_commands_and_options_exist(file, capsys):
    commands = re.findall(r"clipfast ((?:bench )?\w+) (--.*)", Path(checkout.ROOT, file).read_text())
    assert len(commands) >= 2
    for command, arguments in commands:
        with pytest.raises(SystemExit, match="0"):
            main([*command.split(), "--help"])
        help_text = capsys.readouterr().out
        of_clipfast = re.split(r"[|&`]", arguments)[0]
        assert [option for option in re.findall(r"--[\w-]+", of_clipfast) if option not in help_text] == []


def test_targets_of_make_exist():
    targets = re.findall(r"run: make (\S+)", Path(checkout.ROOT, "bench/ci/github-cpu.yml").read_text())
    assert targets
    assert all(re.search(rf"^{target}:", Path(checkout.ROOT, "Makefile").read_text(), re.M) for target in targets)
