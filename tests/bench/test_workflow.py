"""The workflow that users copy calls commands that exist, with options that they have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.bench import checkout

from ..conftest import INTERPRET

pytestmark = pytest.mark.skipif(INTERPRET, reason="reads a file and asks for help")
yaml = pytest.importorskip("yaml")
WORKFLOW = Path(checkout.ROOT, "bench", "ci", "github-gpu.yml").read_text()
COMMANDS = re.findall(r"clipfast ((?:bench )?\w+)(.*)", "\n".join(
    step.get("run", "") for job in yaml.safe_load(WORKFLOW)["jobs"].values() for step in job["steps"]
))  # fmt: skip


def test_there_are_the_two_that_matter():
    assert [command for command, _ in COMMANDS] == ["verify", "bench ops"]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_options_exist(command, arguments):
    help_text = subprocess.run(
        [sys.executable, "-m", "clipfast.cli", *command.split(), "--help"], capture_output=True, text=True, check=True
    ).stdout
    options = re.findall(r"--[\w-]+", arguments)
    assert options
    assert [option for option in options if option not in help_text] == []
