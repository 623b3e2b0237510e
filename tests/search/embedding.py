"""Helpers for the tests of clipfast embed: the arguments of the command, and the content of its folder."""

from pathlib import Path

from clipfast import Embeddings

from ..small_runs import output_of

TINY = "ViT-T-8-32"


def options(home: Path, output: Path, **changes) -> list[str]:
    """Return the arguments of ``clipfast embed``; None leaves an option out, and True makes it a switch."""
    given = {"model": f"local-dir:{home}/model", "data": f"{home}/a.tar::{home}/b.tar", "output": str(output)}
    given |= {"part-size": "50", "batch-size": "16"} | changes
    words = [[f"--{name}", *([] if value is True else [str(value)])] for name, value in given.items() if value]
    return ["embed", *(word for both in words for word in both)]


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder of embeddings by name, except the lock and temporary files of killed processes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock" and not path.name.endswith(".tmp")
    }


def make(capsys, home: Path, output: Path, **changes) -> tuple[Embeddings, str]:
    """Run ``clipfast embed``, and return the embeddings and the output."""
    out, err = output_of(capsys, *options(home, output, **changes))
    return Embeddings.open(output), out + err
