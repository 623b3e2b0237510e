"""Test that all commands treat outputs, integers and help alike. The options are read from the parsers, so none is
forgotten.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.bench import cli as bench
from clipfast.cli import arguments
from clipfast.cli import main as cli
from clipfast.cli.arguments import Output
from clipfast.io import files
from clipfast.train.option_checks import check_value
from clipfast.train.train_config import TrainConfig

from .small_runs import run_command

# Options with the path of a file or folder that a command reads, or that several commands share. None of them is an
# output, which must not exist before.
READ = {
    "--page", "--results", "--tables", "--features", "--folder", "--queries", "--image", "--pictures", "--baseline",
    "--added-labels", "--names", "--root", "--watch", "folder", "file", "files", "images", "image", "runs",
}  # fmt: skip
# Outputs that may exist before, since these commands go on where they were stopped.
PLACES = {("embed", "--output"), ("eval suite", "--output")}


def leaves(parser, name):
    """Yield the name and the parser of each command of clipfast that has no subcommands."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, each in action.choices.items():
            yield from leaves(each, f"{name} {word}".strip())


def commands():
    """Return the parsers of all commands of clipfast."""
    benchmarks = cli.Parser()
    bench.add_commands(benchmarks)
    found = [leaf for command in cli.COMMANDS for leaf in leaves(cli._parser(command), "")]
    return {**dict(found), **dict(leaves(benchmarks, "bench"))}


ALL = commands()


ACTIONS = [(name, action) for name, parser in ALL.items() for action in parser._actions]
OUTPUTS = [(name, action) for name, action in ACTIONS if isinstance(action, Output)]
COUNTS = [(name, action) for name, action in ACTIONS if isinstance(action.type, arguments.Count)]


def named(action):
    """Return the name of an option of a command as its errors show it."""
    return action.option_strings[-1] if action.option_strings else action.dest


def line(name, given, *flags):
    """Return a command line of clipfast with values of some options, and any value for each required one."""
    words, positional = [*name.split(), *flags], []
    for action in ALL[name]._actions:
        if action in given or action.required:
            value = ["1"] * (action.nargs if isinstance(action.nargs, int) else 1)
            value[-1] = str(given.get(action, "a.png" if isinstance(action, Output) else value[-1]))
            value = [next(iter(action.choices))] if action.choices else value
            (words if action.option_strings else positional).extend([*action.option_strings[-1:], *value])
    return [*words, "--", *positional] if positional else words


def place(output, folder):
    """Return a path that the output of a command may have."""
    return folder / f"there{'.png' if output.ends == arguments.DRAWN else next(iter(output.ends), '.pt')}"


def test_every_path_is_an_output_or_known_to_be_read():
    paths = {
        (name, named(action))
        for name, action in ACTIONS
        if action.type in (Path, arguments.folder) and not isinstance(action, Output)
    }
    assert {one for one in paths if one[1] not in READ} == PLACES


@pytest.mark.parametrize(("name", "output"), OUTPUTS, ids=[f"{name} {named(action)}" for name, action in OUTPUTS])
def test_an_output_replaces_nothing_unless_told_and_never_an_input(name, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = place(output, tmp_path)
    path.write_bytes(b"kept")
    code, _, err = run_command(capsys, *line(name, {output: path}))
    assert (code, path.read_bytes()) == (2, b"kept")
    assert f"{path} exists already" in err
    if output.is_folder:
        return
    texts = (None, str, Path, arguments.folder)
    taken = [one for one in ALL[name]._actions if one.metavar and not one.choices and one.type in texts]
    read = next((one for one in taken if not isinstance(one, Output)), None)
    if read is None:  # the command reads nothing that its command line names
        return
    for value in (f"x::{path}", f"{tmp_path}/{{x,{path.stem}}}{path.suffix}", tmp_path):
        code, _, err = run_command(capsys, *line(name, {output: path, read: value}, "--overwrite"))
        assert (code, path.read_bytes()) == (2, b"kept")
        assert any(text in err for text in ("is an input of this command", "which this command reads")), err


def test_every_integer_has_a_range():
    """The integers of training have no range in the parser: ``check_value`` checks them, since recipes may set them."""
    of_training = {field.name: field for field in dataclasses.fields(TrainConfig) if field.metadata["kind"] is int}
    for name, action in ACTIONS:
        assert action.type is not int or action.choices or action.dest in of_training, (name, action.dest)
    for field in of_training.values():
        for value in (2**63, -1):
            with pytest.raises(ValueError, match=r" must (be (at most|more than)|not be)"):
                check_value(field, value)


@pytest.mark.parametrize("value", ["-1", "99999999999999999999"])
@pytest.mark.parametrize(("name", "action"), COUNTS, ids=[f"{name} {named(action)}" for name, action in COUNTS])
def test_an_integer_out_of_range_is_one_line(name, action, value, capsys):
    code, out, err = run_command(capsys, *line(name, {action: value}))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(f"{action.option_strings[-1]} must be at (least|most) [0-9]+, got {value}", err), err


def test_every_help_says_the_exit_codes():
    assert [name for name, parser in ALL.items() if "exit code" not in parser.format_help().lower()] == []


def test_the_tab_key_completes_commands_flags_and_choices():
    pytest.importorskip("argcomplete")
    lines = {"clipfast eval zero": "zeroshot", "clipfast heatmap x --scores so": "softmax"}
    for words, expected in lines.items():
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": words, "COMP_POINT": str(len(words)), "_ARGCOMPLETE_IFS": "\n"}
        shell = [sys.executable, "-m", "clipfast"]
        done = subprocess.run(
            ["sh", "-c", '"$@" 8>&1 9>&2 >/dev/null', "sh", *shell], env=os.environ | asked, stdout=-1
        )
        assert done.stdout.decode().strip() == expected


def test_a_failing_command_leaves_no_output(tmp_path):
    def run(args):
        """Run a command that writes its two outputs, and may fail after that."""
        files.replace_text(tmp_path / "a", "new")
        files.write_folder(tmp_path / "b", lambda folder: (folder / "x").touch())
        if args.fails:
            raise OSError("the cable came off")
        return 0

    parser = argparse.ArgumentParser()
    arguments.add_output(parser, "--a")
    arguments.add_output(parser, "--b", is_folder=True)
    parser.add_argument("--fails", action="store_true")
    parser.set_defaults(run=run)
    given = ["--a", str(tmp_path / "a"), "--b", str(tmp_path / "b")]
    with pytest.raises(OSError, match="the cable"):
        arguments.run(parser.parse_args([*given, "--fails"]))
    assert not list(tmp_path.iterdir())
    assert arguments.run(parser.parse_args(given)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(ValueError, match="two outputs"):
        arguments.run(parser.parse_args(["--a", str(tmp_path / "c"), "--b", str(tmp_path / "c")]))
