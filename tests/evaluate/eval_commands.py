"""Helpers that run commands of ``clipfast eval`` in tests, and check their output, refusals and HTML pages."""

import base64
import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipfast import create_model
from clipfast.cli.main import main

from ..small_runs import everything, output_of, run_command


def save_model(path: Path, seed: int = 0) -> list[str]:
    """Write the weights of a small model, and return the arguments of ``clipfast eval`` that name it."""
    torch.manual_seed(seed)
    torch.save(create_model("ViT-T-8-32").state_dict(), path)
    return ["--model", "ViT-T-8-32", "--pretrained", str(path)]


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """Return stdout and stderr of a task of ``clipfast eval`` that succeeds."""
    return output_of(capsys, "eval", *words)


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """Return the results of a task of ``clipfast eval`` that succeeds."""
    return json.loads(printed(capsys, *words)[0])


def split(words: str, **folders: object) -> list[str]:
    """Split the words of a ``clipfast eval`` command, with the paths of folders filled in."""
    return shlex.split(words.format(**folders))


def wrong_inputs(cases: dict[str, str]) -> pytest.MarkDecorator:
    """Parametrise over the last words of a ``clipfast eval`` command and the message that refuses it."""
    return pytest.mark.parametrize(("words", "message"), cases.items())


def check_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, message: str, *given: object, words: str = "", **folders: object
) -> None:
    """Check that ``clipfast eval`` ends with exit code 2 and one line with the message, and writes nothing.

    ``words`` are the last words of the command; ``folders`` are filled into the words and into the message.
    """
    folders["tmp"], before = folder, everything(folder)
    code, out, err = run_command(capsys, "eval", *given, *split(words, **folders))
    assert (code, out) == (2, ""), err
    last = err.splitlines()[-1]
    assert last.startswith("clipfast eval")
    assert "error: " in last
    assert message.format(**folders) in last
    assert everything(folder) == before


def check_page(page: str, count: int, *sizes: int) -> None:
    """Check that an evaluation's HTML page loads nothing, runs no script, and shows ``count`` square images."""
    assert not re.search(r"<script|https?://|<link|<iframe", page)
    assert "default-src 'none'" in page
    sources = re.findall(r'<img src="data:image/jpeg;base64,(.*?)"', page)
    assert len(sources) == page.count("<img ") == page.count("<figure") == count
    for source in sources:
        assert Image.open(io.BytesIO(base64.b64decode(source))).size in {(size, size) for size in sizes}


def as_rank(rank: int, size: int, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Run ``clipfast eval`` as one process of torchrun; return each exit code, its stdout, and stderr if it fails."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, size, size)), strict=True)))
    found = []
    for words in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(words)
        found.append((code, out.getvalue(), err.getvalue() if code else ""))
    return found
