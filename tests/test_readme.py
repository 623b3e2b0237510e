"""Test that every snippet and command of README and docs/ runs, and that links between these pages lead somewhere."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import clipfast
from clipfast.cli import main as cli
from clipfast.cli.main import main
from clipfast.kernels.spec import specs

from .small_runs import TINY, sample, write_shard

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").rglob("*.md"))
# Pages whose commands and programs need data or models, each with the test file that makes these and runs the page.
TESTED_ELSEWHERE = {
    "evaluate.md": "evaluate/test_evaluation_docs.py",
    "evaluate-composition-bias.md": "evaluate/test_evaluation_docs.py",
    "evaluate-robustness.md": "evaluate/test_evaluation_docs.py",
    "heatmaps.md": "search/test_use_docs.py",
    "training.md": "train/test_training_docs.py",
    "use.md": "search/test_use_docs.py",
    "verify-others.md": "verify/test_others.py",
}
PAGES = [page for page in DOCS if page.name not in TESTED_ELSEWHERE]
SNIPPETS = [
    pytest.param(page.stem, snippet, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *PAGES)
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def commands_in(text, language="sh"):
    """Return the commands in a page's blocks of a language, as lists of words; a backslash joins lines."""
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = commands_in(TEXT + "".join(page.read_text() for page in PAGES))
OURS = [arguments for program, *arguments in COMMANDS if program == "clipfast"]
# The first of these commands trains a model, and the others use it; every other command of the pages stands alone.
CHAIN = ("train", "eval", "embed", "search", "convert", "inspect-checkpoint")
# If a command has a word on the left, the options on the right are added to it, so that its test is quick: two steps
# instead of a thousand, one plan and one op instead of several, small sizes, and no process that measures memory.
SHORT = {
    "--recipe": "--epochs 1 --train-num-samples 16 --batch-size 8 "
    "--train-data bundled:x --val-data bundled:x --val-leave-out odd",
    "--samples-seen": "--samples-seen 64 --batch-size 32",
    "--fit": "--checkpointing none",
    "--pairs": "--pairs 256 --gpus 2",
    "--arch": "--jobs 1 --case 'attention N17 D32 bf16'",
    "--smoke": "--only clipfast --no-memory",
    "verify": "--op bias_quick_gelu",
}


def shortened(arguments, data):
    """Return a command with options that shorten it, and with a few pictures in place of the bundled ones."""
    more = next((shlex.split(options) for word, options in SHORT.items() if word in arguments), [])
    return [data if word.startswith("bundled:") else word for word in [*arguments, *more]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that returns the folder in which the snippets of a page run one after the other.

    A snippet finds the files of those before it, as a reader does. The folders are removed, since they hold models.
    """
    root = tmp_path_factory.mktemp("pages")

    def folder(page):
        """Return the folder in which the commands of a page run."""
        (root / page).mkdir(exist_ok=True)
        return root / page

    yield folder
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return a shard of a few pairs for the commands of a page."""
    return str(write_shard(tmp_path_factory.mktemp("pairs") / "a.tar", [sample(index) for index in range(24)]))


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_snippet(page, snippet, folder_of, monkeypatch, open_clip_registry):
    """OpenCLIP's ViT-B-32 is a tiny model here, since the results that a page shows do not depend on its size."""
    monkeypatch.chdir(folder_of(page))
    factory = pytest.importorskip("open_clip.factory")
    factory._MODEL_CONFIGS["ViT-B-32"] = json.loads(Path(TINY).read_text())
    if page == "library":
        snippet = snippet.replace("ViT-B-32", "ViT-T-8-32")
    exec(compile(snippet, "snippet", "exec"), {})


def test_commands_on_one_model(tmp_path, monkeypatch, capsys, pairs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), name).save(tmp_path / "photos" / f"{name}.png")
    for arguments in OURS:
        if arguments[0] in CHAIN:
            assert main(shortened(arguments, pairs)) == 0, capsys.readouterr().err
    assert (tmp_path / "found.html").exists()


@pytest.mark.parametrize("arguments", [each for each in OURS if each[0] not in CHAIN], ids=" ".join)
def test_command(arguments, tmp_path, monkeypatch, capsys, pairs):
    monkeypatch.chdir(tmp_path)
    assert main(shortened(arguments, pairs)) == 0, capsys.readouterr().err


def test_commands_in_the_checkout(tmp_path, monkeypatch):
    assert {program for program, *_ in COMMANDS} == {"make", "clipfast", "pip", "python", "pytest"}
    monkeypatch.chdir(tmp_path)
    for program, *arguments in COMMANDS:
        if program == "python":
            monkeypatch.setattr(sys, "argv", shortened(arguments, ""))
            assert sys.argv.pop(0) == "-m"
            with pytest.raises(SystemExit, match=r"^0$"):
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        if program == "pytest":
            command = [sys.executable, "-m", "pytest", "--benchmark-disable", *arguments]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_make_targets():
    expected = {
        "train": "clipfast train --recipe emoji", "train-shapes": "clipfast eval compositional", "test": "pytest",
        "gpu": "-m bench.gpu --out runs/gpu --stub",
    }  # fmt: skip
    targets = [arguments for program, *arguments in COMMANDS if program == "make"]
    assert sorted(target for target, *_ in targets) == sorted(expected)
    for target in targets:
        plan = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected[target[0]] in plan.stdout


def test_commands_on_other_peoples_data_are_understood(capsys):
    """Commands in blocks of text need data, weights or GPUs that tests lack, so they are parsed and not run."""
    commands = [command for page in DOCS for command in commands_in_text(page) if command]
    assert len(commands) > 5
    for command in commands:
        if command[0] == "train":
            assert main([*command, "--print-config"]) == 0, (command, capsys.readouterr().err)
        else:
            cli._parser(command[0]).parse_args(command)  # exits if an option is unknown


def commands_in_text(page):
    """Yield the arguments of each command of clipfast in a page's blocks of text, which hold other lines as well."""
    for block in re.findall(r"```text\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if start := re.match(r"(torchrun .*-m )?clipfast (-- )?", line):
                yield shlex.split(line[start.end() :], comments=True)


def prose_of(page):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page):
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page):
    """Return the files and headings of this repository that a page links to."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    return [target.partition("#")[::2] for target in targets if not re.match(r"\w+:", target)]


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for name, anchor in links_of(page):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors_of(target), f"{name}#{anchor}"


def test_every_page_is_found_from_the_readme():
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in found:
            found.add(page)
            targets = [(page.parent / name).resolve() for name, _ in links_of(page) if name.endswith(".md")]
            waiting += targets
    assert set(DOCS) <= found
    pictures = {path for page in found for name, _ in links_of(page) if (path := (page.parent / name).resolve())}
    assert set((ROOT / "docs").glob("*.png")) <= pictures


def test_the_readme_says_how_much_faster_a_step_is():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| \S+, [\d,]+ \|.*?\| ([\d.]+) \(", page, re.MULTILINE)
    least, most = min(rows, key=float), max(rows, key=float)
    assert f"{least} to {most} times as fast" in " ".join(TEXT.split())


@pytest.mark.parametrize("name", sorted(specs()))
def test_how_an_op_works_is_said_with_its_floor(name):
    page, shape = ROOT / "docs" / "kernels.md", specs()[name].bench["cuda"][0]
    floors = [specs()[name].floor(shape, 2, backward) for backward in (False, True)]
    figures = " | ".join(f"{floor.flops / 1e9:,.4g} | {floor.bytes / 1e6:,.4g}" for floor in floors)
    assert f"| `{name}` | {shape} | {figures} |" in page.read_text()
    section = {"bias_quick_gelu": "bias_gelu", "attention_qkv": "attention"}.get(name, name)
    if name == "quantize_weight" or (name.endswith("_fp8") and name not in anchors_of(page)):
        section = "quantize_rows"
    assert section in anchors_of(page) | anchors_of(page.with_name("losses.md"))


def test_extras_hold_what_make_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = "".join(page.read_text() for page in (ROOT / "Makefile", ROOT / "README.md", *DOCS))
    installed = re.findall(r"(?:\.|clipfast)\[([\w,]+)\]", pages)
    assert installed
    for names in installed:
        assert set(names.split(",")) <= set(extras)


def test_links_of_pypis_page_are_absolute():
    for_pypi = runpy.run_path(ROOT / "setup.py", run_name="not main")["for_pypi"]
    text = "![a picture](docs/a.png) and [a page](docs/b.md#part), [here](#part), [PyPI](https://pypi.org)"
    assert for_pypi(text, "https://host/x", "1.0") == (
        "![a picture](https://host/x/raw/v1.0/docs/a.png) and [a page](https://host/x/blob/v1.0/docs/b.md#part), "
        "[here](#part), [PyPI](https://pypi.org)"
    )
    assert for_pypi(text, "", "1.0") == " and a page, [here](#part), [PyPI](https://pypi.org)"
    assert "](docs/" not in for_pypi(TEXT, "https://host/x", "1.0")


def test_citation_and_changelog_are_of_this_version():
    assert f"version: {clipfast.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {clipfast.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
