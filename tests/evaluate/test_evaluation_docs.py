"""Every command of docs/evaluate*.md runs, with a small model."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from clipfast import create_model
from clipfast.checkpoints.open_clip_folder import export_open_clip
from clipfast.cli.main import main
from clipfast.evaluate.labelled import LabelledSet

from ..small_runs import picture, sample, write_shard
from .benchmark_sets import write_set
from .test_compositional import write_aro, write_sugar_crepe, write_winoground

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = "".join(path.read_text() for path in sorted(DOCS.glob("evaluate*.md")))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the models and the data that docs/evaluate*.md name, and return their folder."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    for name in ("demo", "second"):
        export_open_clip(create_model("ViT-T-8-32"), folder / "runs" / name)
    write_set(folder / "benchmark" / "wds_vtab-cifar10", images=12, splits=("test", "train"))
    write_set(folder / "benchmark" / "wds_flickr8k", images=12, kind="retrieval")
    (folder / "data").mkdir()
    (folder / "labels.tsv").write_text("category\tlabel\n")
    (folder / "queries.txt").write_text("a thing\nanother thing\n")
    for number in range(2):
        write_shard(folder / "data" / f"{number:03}.tar", [sample(12 * number + index) for index in range(12)])
    for seed, name in enumerate(("cat", "dog", "emu")):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(4):
            (folder / "photos" / name / f"{index}.png").write_bytes(picture(10 * seed + index))
    write_aro(folder / "aro")
    write_sugar_crepe(folder / "sugar-crepe")
    write_winoground(folder / "winoground")
    rows = [f"{model},{shift}" for shift in ("twemoji", "fluent") for model in ("small,0.3,0.2", "large,0.7,0.5")]
    (folder / "baseline.csv").write_text("\n".join(["model,base,shift,set", *rows]) + "\n")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    program, *arguments = shlex.split(command)
    # The test replaces the page's emoji and scenes by fewer images, which takes less time.
    arguments = ["shapes:30" if word == "shapes" else word for word in arguments]
    arguments = [re.sub(r"^(\w+=)?bundled:\S+", r"\1photos", word) for word in arguments]
    # The commands run without torchrun here; the tests of each task compare ranks with one process.
    if program == "torchrun":
        assert arguments[:5] == ["--nproc-per-node", "2", "-m", "clipfast", "--"]
        program, arguments = "clipfast", arguments[5:]
    assert program == "clipfast"
    assert main(arguments) == 0, capsys.readouterr().err
    for flag in ("--json", "--plot", "--html", "--output", "--examples"):
        assert flag not in arguments or Path(arguments[arguments.index(flag) + 1]).exists()


def test_the_groups_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(program, {})
    people = list(LabelledSet("people.tar", group_by="who+style", label_by="what"))
    assert {person.group for person in people} == {"man + fluent", "woman + fluent"}
    figures = json.loads((DOCS / "bias.json").read_text())
    assert len(people) == figures["images"]
    assert len({person.label for person in people}) == figures["classes"]
