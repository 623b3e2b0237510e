"""Arguments that are common to the commands, and the checks of a command's outputs before it begins."""

from __future__ import annotations

import argparse
import glob
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..io.files import check_target, together
from ..io.text import meant, printable

# Matches a brace expression such as {000..099} in the name of inputs. It may stand for a huge number of files, so it is
# replaced by "*" to find the files that exist.
BRACES = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}")
UNREAD = 141  # the exit code of a process that SIGPIPE ends
DRAWN = ("drawn",)  # value of ``Output.ends`` for the suffixes of all formats that matplotlib can write
# Options that several commands have.
CACHE_DIR: dict[str, Any] = {
    "metavar": "FOLDER", "help": "cache of the Hugging Face hub (default: huggingface_hub's own, which HF_HOME moves)",
}  # fmt: skip
TABLE: dict[str, Any] = {"action": "store_true", "help": "print a table in place of JSON, which --json still writes"}
TOKENIZER: dict[str, Any] = {
    "metavar": "PATH", "help": "tokenizer.json of a SigLIP model, or its folder (default: the model's)",
}  # fmt: skip
TRUST: dict[str, Any] = {"action": "store_true", "help": "load a TorchScript archive, which may run its code"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the lines of examples, wraps descriptions, and names values by their types."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap a description or an epilog; a text with line breaks, such as examples, is kept as it is."""
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """Return INT, FLOAT or FILE as the metavar of an option with such a value, in place of the option's name."""
        if isinstance(action.type, Count):
            return "INT"
        names: dict[Any, str] = {float: "FLOAT", Path: "FILE"}
        return names.get(action.type) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """A command-line parser whose errors are one line, with a suggestion if a similar word is known."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})

    def runs(self, function: Callable[[argparse.Namespace], int], *aliases: str) -> None:
        """Set the function that the command calls, and add the flag ``--traceback`` with its ``aliases``."""
        self.add_argument("--traceback", *aliases, action="store_true", help="show where an error was raised")
        self.set_defaults(run=function)

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        """Parse command-line arguments as argparse does, and end with an error if some of them are unknown.

        argparse would pass the unknown arguments of a subcommand on to the main parser. With an error here, the
        subcommand's parser reports them, with its own usage and suggestions.
        """
        found, left = super().parse_known_args(*args, **options)
        if left:
            flags = [word.partition("=")[0] for word in left if word.startswith("--")]
            suggestion = meant(flags[0], self._option_string_actions) if flags else ""
            self.error(f"unrecognized arguments: {' '.join(left)}{suggestion}")
        return found, left

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise an error for a value that is not one of an option's choices, with a suggestion."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            suggestion = meant(str(value), known)
            # All choices are listed if they are few, since the most similar one may mislead: bf16 for fp16.
            if not suggestion or len(known) < 10:
                suggestion += f" (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{suggestion}")

    def format_help(self) -> str:
        """Return the text of ``--help``, with a line about exit codes at the end if it says nothing about them."""
        text = super().format_help()
        codes = "exit code: 0 done, 2 an error, which is one line on stderr, 130 interrupted\n"
        return text if "exit code" in text.lower() else f"{text}\n{codes}"

    def error(self, message: str) -> NoReturn:
        """Print the error of a wrong argument, and exit with code 2."""
        message = re.sub("^argument (.+?): must", r"\1 must", message)
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


class Output(argparse.Action):
    """The argparse action of an option whose value, or last value, names an output file or folder.

    Args:
        ends: the allowed suffixes of the name, or ``DRAWN`` for all formats of matplotlib; () allows any.
        is_folder: whether the output is a folder, which must not exist yet.
        is_held: whether the output is written to a temporary name first, and gets its name when the command has
            succeeded, together with the other outputs.
    """

    def __init__(
        self, *args: Any, ends: Iterable[str] = (), is_folder: bool = False, is_held: bool = True, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.ends, self.is_folder, self.is_held = tuple(ends), is_folder, is_held

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        """Store the value of the option, and add the output to ``outputs`` of the namespace."""
        if values is None:  # a left-out positional argument must not replace the value of an option with the same dest
            return
        setattr(namespace, self.dest, values)
        path = Path(values[-1] if isinstance(values, list) else values)
        namespace.outputs = getattr(namespace, "outputs", {}) | {self.dest: (self, path)}

    def check(self, path: Path, inputs: Iterable[Path], *, overwrites: bool) -> None:
        """Check before a command runs that its output can be written to a path.

        Args:
            path: the path of the output.
            inputs: files and folders that the command reads.
            overwrites: whether an existing file may be replaced (``--overwrite``).

        Raises:
            ValueError: the path cannot be written, exists, is an input, or is in the folder of an input.
        """
        flag = self.option_strings[0] if self.option_strings else str(self.metavar)
        ends = _drawn_ends() if self.ends == DRAWN else self.ends
        if ends and path.suffix.lower() not in ends:
            raise ValueError(f"{flag} {path}: the name must end in {'one of ' * (len(ends) > 1)}{', '.join(ends)}")
        if os.path.lexists(path) and (self.is_folder or path.is_dir()):
            raise ValueError(f"{flag} {path} exists already: give another name, or remove it")
        check_target(path)
        if not os.path.lexists(path):
            return
        if not overwrites:
            raise ValueError(f"{flag} {path} exists already: give another name, or --overwrite to replace it")
        if path.exists() and not path.is_file():
            raise ValueError(f"{flag} {path} is no regular file, and cannot be replaced")
        for read in inputs:
            if path.exists() and read.samefile(path):
                raise ValueError(f"{flag} {path} is an input of this command: give another name")
            if read.resolve() in path.resolve().parents:
                raise ValueError(f"{flag} {path} is in {read}, which this command reads: give another name")


def add_output(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an option for an output of a command, with settings for :class:`Output`, and ``--overwrite`` if missing."""
    if options.get("nargs") != 2:
        options = {"type": Path} | options
    parser.add_argument(*names, action=Output, **options)
    if "--overwrite" not in parser._option_string_actions:
        parser.add_argument("--overwrite", action="store_true", help="replace files to write that exist already")


class Count:
    """The argparse type of an integer option, from ``least`` to ``most``."""

    def __init__(self, least: int = 1, most: int = 2**31 - 1) -> None:
        self.least, self.most, self.__name__ = least, most, "integer"

    def __call__(self, text: str) -> int:
        """Parse the integer that is given to an option, and check its limits."""
        value = int(text)
        if not self.least <= value <= self.most:
            bound = f"at least {self.least}" if value < self.least else f"at most {self.most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, got {text}")
        return value


COUNT, OR_ZERO = Count(), Count(0)
BATCH, PIXELS, SEED = Count(1, 2**20), Count(1, 2**13), Count(0, 2**32 - 1)
WORKERS = Count(0, 1024)  # the number of data worker processes
DIST_TIMEOUT: dict[str, Any] = {
    "type": Count(1, 366 * 24 * 60 * 60), "default": 600,
    "help": "seconds after which the processes of torchrun give up waiting for another one (default: 600)",
}  # fmt: skip


def folder(text: str) -> Path:
    """Parse the argument of a folder, which need not exist, to a path."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return path


def run(args: argparse.Namespace) -> int:
    """Check the outputs of any command of clipfast, run the command, and return its exit code.

    Raises:
        ValueError: an output cannot be written, exists already, is an input, or is named twice.
    """
    outputs: dict[str, tuple[Output, Path]] = getattr(args, "outputs", {})
    places = [path.resolve() for _, path in outputs.values()]
    for number, (_, path) in enumerate(outputs.values()):
        if places[number] in places[:number]:
            raise ValueError(f"two outputs would be written to {path}: give another name to one of them")
    for output, path in outputs.values():
        output.check(path, _inputs(args), overwrites=args.overwrite)
    shows_at_once = getattr(args, "watch", None)  # with --watch, outputs are updated while the command runs
    held = [path for output, path in outputs.values() if output.is_held and not shows_at_once]
    with together(held):
        code: int = args.run(args)
    print(end="", flush=True)  # Python's own flush at its end would report an error in two lines
    return code


def is_unread(error: BaseException) -> bool:
    """Return whether the reader of the output has ended, as ``head`` does; if so, nothing is written to it any more."""
    if not isinstance(error, BrokenPipeError):
        return False
    poll = select.poll()
    poll.register(sys.stdout, 0)  # 0 asks for errors only
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _inputs(args: argparse.Namespace) -> Iterator[Path]:
    """Yield all existing files and folders that the arguments of a command name, except its outputs."""
    for name, value in vars(args).items():
        if name in args.outputs:
            continue
        for word in value if isinstance(value, list | tuple) else [value]:
            parts = {str(word), *re.split("::|,", BRACES.sub("*", str(word)))} if isinstance(word, str | Path) else ()
            for part in (re.sub("^(local-dir:|file:(//)?)", "", part) for part in parts):
                yield from map(Path, {*glob.iglob(BRACES.sub("*", part)), *filter(os.path.exists, [part])})


def _drawn_ends() -> tuple[str, ...]:
    """Return the file extensions of all formats that matplotlib can write."""
    from matplotlib.figure import Figure

    return tuple(f".{name}" for name in sorted(Figure().canvas.get_supported_filetypes()))
