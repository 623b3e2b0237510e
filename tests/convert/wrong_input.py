"""Files with something wrong in them, and the check of a refusal, for all tests of wrong input."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clipfast import CLIP

from ..clip.conftest import run_command

OUT = {"open_clip": "out", "hf": "out", "clipfast": "out.pt"}


Prepare = Callable[[CLIP, Path], None]


class Refusals(list[tuple[Prepare | None, str, str]]):
    """What prepares a refusal, the arguments of the command, and what its message contains."""

    def __call__(self, command: str, message: str) -> Callable[[Prepare], Prepare]:
        """Keep the function that this decorates, which makes files from a model and its folder of transformers."""

        def keep(prepare: Prepare) -> Prepare:
            self.append((prepare, command, message))
            return prepare

        return keep


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def changed(model: CLIP, path: Path | str, **changes: torch.Tensor | None) -> None:
    """A clipfast checkpoint of the model with other tensors, whose names have "__" for "."; None takes one out."""
    state = dict(model.state_dict()) | {name.replace("__", "."): value for name, value in changes.items()}
    state = {name: value for name, value in state.items() if value is not None}
    torch.save({"state_dict": state, "clipfast": {"model_config": model.config.to_dict()}}, path)


def edited(path: Path, **changes: object) -> None:
    """A JSON file with other settings."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edited_tower(folder: Path, tower: str, **changes: object) -> None:
    """A folder of transformers with other settings of "vision_config" or "text_config"."""
    raw = json.loads((folder / "config.json").read_text())
    edited(folder / "config.json", **{tower: raw[tower] | changes})


def assert_refused(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    """``clipfast convert`` prints one line with the message, and leaves the working directory as it is.

    Args:
        capsys: the fixture.
        command: its arguments. A destination and "--to clipfast" are added where they are missing.
        message: what the line contains.
    """
    source, *rest = command.split()
    to = rest[rest.index("--to") + 1] if "--to" in rest else "clipfast"
    arguments = [source, *rest, *([] if "--to" in rest else ["--to", to])]
    if not rest or rest[0].startswith("--"):
        arguments.insert(1, OUT.get(to, "out"))
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code, out, error = run_command(capsys, "convert", *arguments)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error
    assert error.startswith("clipfast convert: error: ")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
