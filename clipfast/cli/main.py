"""The entry point of ``clipfast COMMAND``: a table of all commands, of which only the given one is imported."""

import argparse
import atexit
import contextlib
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .. import __version__
from ..io.text import printable
from .arguments import UNREAD, Parser, is_unread, run

# This maps each command to its line in ``clipfast --help``. The function ``add_parser`` in the command's module, which
# is in this package, adds the parser of the command and sets the function ``run`` that the command calls.
COMMANDS = {
    "train": "train a model on image-text pairs",
    "status": "show how far runs are, and plot them",
    "index": "index shards, so that a training run starts at once",
    "eval": "evaluate a checkpoint",
    "interpolate": "mix the weights of two checkpoints, and evaluate the models between them (WiSE-FT)",
    "heatmap": "show where in a picture is what texts say",
    "embed": "compute the features of pictures and texts",
    "search": "find embedded pictures by words, by a picture, or by both",
    "app": "search an embedded folder on a page of this machine",
    "dedup": "find near duplicates among embedded pictures",
    "filter": "choose embedded pairs whose image and text fit together",
    "cluster": "group embedded pictures by likeness",
    "classify": "say which of some labels fits pictures",
    "convert": "convert a checkpoint between OpenCLIP, transformers and clipfast",
    "inspect-checkpoint": "say what a checkpoint is, and its checksum",
    "list-pretrained": "list the published weights that are loaded by name",
    "verify": "check the numerics of kernels, model and training",
    "inspect": "show what the compiler made of every kernel, without a GPU",
    "plan": "predict memory and time of the loss or of training",
    "doctor": "look at this machine: what it has, what is wrong, and what to do",
}
MODULES = {"inspect": "clipfast.bench.inspection.command"}  # modules of commands that are not in clipfast.cli
# This maps the first command of each group in ``clipfast --help`` to the title of the group.
GROUPS = {
    "train": "train", "eval": "evaluate", "embed": "search and sort pictures", "convert": "checkpoints",
    "verify": "kernels and machines",
}  # fmt: skip
INTERRUPTED = 130  # exit code of a command that was ended by Ctrl-C
COMPILER = "clipfast.bench.inspection.others:compiled"  # the function that compiles the user's kernels for ``verify``
BENCH = ("bench", "time ops, training steps and data loading against other implementations", "clipfast.bench.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``clipfast`` and return its exit code; a mistake of the user gives one line on stderr and the code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments else ""
    _complete()
    hint, shown = "", Exception()
    try:
        if chosen == BENCH[0]:
            bench: Callable[..., int] = pkgutil.resolve_name(f"{BENCH[2]}:main")
            return bench(arguments[1:], prog="clipfast bench")
        return run(_parser(chosen).parse_args(arguments))
    except KeyboardInterrupt:
        print(f"clipfast {chosen}: interrupted", file=sys.stderr)
        if argv is None:
            _exit_at_once(INTERRUPTED)
        return INTERRUPTED
    except ImportError as error:
        knows_what = "install" in str(error).lower()  # as fsspec's errors do
        hint, shown = "" if knows_what else "; install what it needs: pip install 'clipfast[data,eval]'", error
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        shown = error
    if is_unread(shown):
        return UNREAD
    if {"--traceback", "--debug"} & set(arguments):
        raise shown
    lines = "\n".join(map(printable, f"{shown}{hint}".split("\n")))
    print(f"clipfast {chosen}: error: {lines}", file=sys.stderr)
    return 2


def _complete() -> None:
    """If a shell asks for completions of a command line, print them by argcomplete and end the process."""
    if "_ARGCOMPLETE" in os.environ:
        with contextlib.suppress(ImportError):
            import argcomplete

            words = os.environ.get("COMP_LINE", "").split()
            argcomplete.autocomplete(_parser(words[1] if len(words) > 1 else ""))


def _exit_at_once(code: int) -> NoReturn:
    """End the ``clipfast`` process without Python's cleanup, which would abort it if a thread runs C++ code."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _parser(chosen: str) -> argparse.ArgumentParser:
    """Return the parser of ``clipfast``, with the parser of the chosen command.

    If ``chosen`` is no command, the parser gets an empty parser for each command, which ``clipfast --help`` needs.
    """
    parser = Parser(
        prog="clipfast",
        description="Train and evaluate CLIP on Triton kernels.",
        epilog=_overview(),
    )
    parser.add_argument("--version", action="version", version=f"clipfast {__version__}")
    shown = "one of the commands below; clipfast COMMAND --help explains it"
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=shown)
    if chosen in COMMANDS:
        module = MODULES.get(chosen, f"clipfast.cli.{chosen.replace('-', '_')}")
        add_parser: Callable[[object], None] = pkgutil.resolve_name(f"{module}:add_parser")
        add_parser(commands)
        return parser
    for name in (*COMMANDS, BENCH[0]):
        commands.add_parser(name, add_help=False)
    return parser


def _overview() -> str:
    """Return the overview of all commands for ``clipfast --help``: groups, with a line for each command."""
    lines = []
    for name, text in {**COMMANDS, BENCH[0]: BENCH[1]}.items():
        lines += [f"\n{GROUPS[name]}:"] if name in GROUPS else []
        lines.append(f"  {name:20}{text}")
    return "\n".join(lines).strip()
