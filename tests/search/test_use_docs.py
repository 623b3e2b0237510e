"""Every command and program of docs/use.md and docs/heatmaps.md runs, with a small model."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

from clipfast import create_model
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.cli.app import add_parser, desk_of
from clipfast.cli.arguments import Parser
from clipfast.cli.main import main

from ..processes import run_ranks
from ..small_runs import picture, sample, write_shard
from ..train.test_training_docs import as_rank

pytest.importorskip("pyarrow")

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "use.md").read_text() + (DOCS / "heatmaps.md").read_text()
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder with the model and the data that docs/use.md names."""
    folder = tmp_path_factory.mktemp("use")
    torch.manual_seed(0)
    export_open_clip(create_model("ViT-T-8-32"), folder / "runs/demo")
    (folder / "data").mkdir()
    (folder / "names.txt").write_text("cat\ndog\n")
    for number in range(2):
        write_shard(folder / "data" / f"{number:03}.tar", [sample(12 * number + index) for index in range(12)])
    for seed, name in enumerate(("beach.png", "day 2/cat.png", "day 2/dog.png")):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(picture(seed))
    return folder


@pytest.mark.long
def test_the_page(folder, tmp_path, monkeypatch, capsys):
    """The commands and programs of docs/use.md run in their order, since later ones read files of earlier ones."""
    monkeypatch.chdir(folder)
    lacking = [word for word in ("open_clip:", "faiss") if importlib.util.find_spec(word.strip(":")) is None]
    for number, (kind, block) in enumerate(BLOCKS):
        if kind == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            # The test replaces the page's bundled emoji by fewer images, which takes less time.
            arguments = ["data/{000..001}.tar" if word.startswith("bundled:") else word for word in arguments]
            if any(word in line for word in lacking):
                continue
            if program == "torchrun":
                start = arguments.index("--") + 1
                assert arguments[:start] == ["--nproc-per-node", "2", "-m", "clipfast", "--"]
                (tmp_path / f"{number}").mkdir()
                given = [[*arguments[start:], "--workers", "0"]]  # a daemonic process cannot start data workers
                assert run_ranks(as_rank, 2, str(folder), given, folder=tmp_path / f"{number}") == [[""], [""]]
                continue
            assert program == "clipfast"
            if arguments[0] == "app":  # the command app would serve until it is stopped, so serving is left out
                parser = Parser()
                add_parser(parser.add_subparsers())
                assert desk_of(parser.parse_args(arguments)).search("a cat", None, 0.5, "", 3)
                continue
            assert main(arguments) == 0, (line, capsys.readouterr().err)
