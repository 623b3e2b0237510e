"""Arguments that mean the same in every command: what it writes, and what is checked before it begins."""

from __future__ import annotations

import argparse
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .files import check_target, together

DRAWN = ("drawn",)  # in place of the endings of an output: those that matplotlib can draw


class Output(argparse.Action):
    """The name of something that the command writes; it is the last word of options that take several.

    Args:
        ends: what the name must end in: one of some suffixes, or of those that matplotlib draws (``DRAWN``); or any.
        is_folder: it is a folder, which is never replaced.
        is_held: it appears with the other outputs at the end, and not at all after an error.
    """

    def __init__(
        self, *args: Any, ends: Iterable[str] = (), is_folder: bool = False, is_held: bool = True, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.ends, self.is_folder, self.is_held = tuple(ends), is_folder, is_held

    def __call__(self, _: object, namespace: argparse.Namespace, values: Any, __: str | None = None) -> None:
        """Keep the value, and note in ``outputs`` of the namespace what is written."""
        setattr(namespace, self.dest, values)
        path = Path(values[-1] if isinstance(values, list) else values)
        namespace.outputs = getattr(namespace, "outputs", {}) | {self.dest: (self, path)}

    def check(self, path: Path, inputs: Iterable[Path], *, overwrites: bool) -> None:
        """Refuse to write to ``path`` if it cannot be written, exists, or is an input or in a folder that is one.

        Raises:
            ValueError: as above.
        """
        flag = self.option_strings[-1] if self.option_strings else str(self.metavar)
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
            raise ValueError(f"{flag} {path} is no regular file, so that it cannot be replaced")
        for read in inputs:
            if path.exists() and read.samefile(path):
                raise ValueError(f"{flag} {path} is an input of this command: give another name")
            if read.resolve() in path.resolve().parents:
                raise ValueError(f"{flag} {path} is in {read}, which this command reads: give another name")


def add_output(parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
    """Add an option for something to write, with the settings of :class:`Output`, and ``--overwrite`` if it lacks."""
    if not options.get("nargs"):
        options = {"type": Path, "metavar": "FILE"} | options
    parser.add_argument(*names, action=Output, **options)
    if "--overwrite" not in parser._option_string_actions:
        parser.add_argument("--overwrite", action="store_true", help="replace files to write that exist already")


def folder(text: str) -> Path:
    """Return the path of a folder, which need not exist."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return path


def run(args: argparse.Namespace) -> int:
    """Check what a command will write, run it, and return its exit code.

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
    shows_at_once = getattr(args, "watch", None)  # what a command has so far, while it waits for more
    held = [path for output, path in outputs.values() if output.is_held and not shows_at_once]
    with together(held):
        code: int = args.run(args)
        return code


def _inputs(args: argparse.Namespace) -> Iterator[Path]:
    """Yield all files and folders that exist of those that arguments name, except outputs."""
    for name, value in vars(args).items():
        if name in args.outputs:
            continue
        for word in value if isinstance(value, list | tuple) else [value]:
            for part in re.split("::|,", str(word)) if isinstance(word, str | Path) else ():
                # what stands in braces is not expanded, since it could be any number of names
                pattern = re.sub(r"\{[^}]*\}", "*", re.sub("^(local-dir:|file:(//)?)", "", part))
                yield from map(Path, {*glob.iglob(pattern), *([part] if part and os.path.exists(part) else [])})


def _drawn_ends() -> tuple[str, ...]:
    from matplotlib.figure import Figure

    return tuple(f".{name}" for name in sorted(Figure().canvas.get_supported_filetypes()))
