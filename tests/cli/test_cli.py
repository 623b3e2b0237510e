"""The command line: its help texts, and its errors for wrong input."""

import sys

import pytest

from clipfast.cli.main import COMMANDS

from ..small_runs import TINY, run_command

HELP = dict.fromkeys(COMMANDS, "exit code") | {
    "": "checkpoints:", "eval zeroshot": "--templates", "train": "memory and speed:", "bench": "layer_norm",
}  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_help_teaches(capsys, command):
    code, out, _ = run_command(capsys, *command.split(), "--help")
    assert code == 0
    assert out.startswith(f"usage: clipfast {command}")
    assert HELP[command] in out.lower()


EMOJI = ["train", "--recipe", "emoji"]
EVAL = ["eval", "zeroshot", "--data", "x"]
BAD = [
    (["train"], "--train-data is needed"),
    (
        ["train", "--recipe", "emojis"],
        "no recipe 'emojis' (did you mean emoji?): neither a file nor one of clip-",
    ),
    ([*EMOJI, "--batch-size", "0"], "--batch-size must be more than 0, got 0"),
    ([*EMOJI, "--micro-batch-size", "0"], "--micro-batch-size must be more than 0, got 0"),
    (["train", "--train-data", "missing-{0..2}.tar"], "no such shard: missing-0.tar (3 of 3 are missing)"),
    (["train", "--resume", "nowhere"], "no run to resume at nowhere: there is neither a folder nor a checkpoint"),
    ([*EMOJI, "--unique-by", "breed"], "has no 'breed' in its json; it has category, hexcode"),
    ([*EMOJI, "--backend", "triton"], "backend='triton' cannot run on a cpu tensor"),
    (
        [*EVAL, "--model", "ViT-B-32"],
        "ViT-B-32 has no weights of its own: pass the path of a checkpoint as pretrained, or a tag of "
        "clipfast.list_pretrained() (on the command line --pretrained)",
    ),
    ([*EVAL, "--model", "ViT-T-8-32", "--pretrained", "openai"], "no checkpoint at openai: "),
    ([*EVAL, "--model", "local-dir:nowhere"], "is not a model configuration that can be read"),
    ([*EVAL, "--model", "x.pt", "--templates", "funny"], "--templates must be one of plain, simple, openai or a file"),
    ([*EVAL, "--model", "x.pt", "--templates", "t.txt"], "template 'a photo.' in t.txt has no {} for the class name"),
    ([*EVAL, "--model", "x.pt", "--classnames", "funny"], "--classnames must be 'imagenet' or a file, got 'funny'"),
    ([*EVAL, "--model", "x.pt", "--device", "cuda"], "no GPU for 'cuda': PyTorch finds none"),
    ([*EVAL, "--model", "x.pt", "--device", "mps"], "clipfast runs on cpu and cuda, not on 'mps'"),
    ([*EMOJI, "--device", "warp"], "unknown device 'warp': use cpu, cuda, cuda:N or auto"),
    ([*EMOJI, "--lr", "inf"], "--lr must be a finite number, got inf"),
    ([*EMOJI, "--logs", "t.txt/runs"], "Not a directory"),
    (
        [*EMOJI, "--batchsize", "7"],
        "train: error: unrecognized arguments: --batchsize 7 (did you mean --batch-size?)",
    ),
    (["train", "--train-data", "train.csv"], "shard train.csv cannot be read: it is empty"),
    (
        ["train", "--train-data", "t.txt"],
        "t.txt is no shard: pairs come from tar, Parquet and Arrow files, from tables (.csv",
    ),
    (["train", "--train-data", "folder"], "shard folder/ cannot be read: the folder has no images (jpg, jpeg"),
    (["train", "--train-data", "folder/*.tar"], "no such shard: nothing matches folder/*.tar"),
    (
        ["train", "--train-data", "t.tar"],
        "t.tar cannot be read: not a tar file: no valid header of a member in its 9 bytes",
    ),
    (["train", "--resume", "folder"], "folder holds no checkpoint to resume from"),
    (["plan", "--pairs", "0"], "--pairs must be at least 1, got 0"),
    (["plan", "--embed-dim", "8", "--train"], "--embed-dim has no effect on --train"),
    (["plan", "--card", "v100"], "--card: unknown 'v100'; known: a100, h100, h200, b200. For another, take"),
    (["plan", "--memory-gb", "nan"], "--memory-gb must be a finite number, got nan"),
    (["plan", "--json", "nowhere/plan.json"], "no folder nowhere to write plan.json in"),
    (["verify", "--op", "softmax"], "--op: unknown 'softmax'"),
    (["verify", "--against", "timm"], "--against: unknown 'timm'; known: openclip, hf"),
    (["verify", "--device", "cuda"], "--device cuda: PyTorch sees no CUDA GPU here"),
    (["verify", "--op", "curve", "--quick"], "leave nothing to check"),
    ([], "the following arguments are required: COMMAND"),
    (["eval", "zero-shot"], "invalid choice: 'zero-shot' (did you mean zeroshot?)"),
    (["trian"], "invalid choice: 'trian' (did you mean train?)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:45] for _, message in BAD])
def test_bad_input_is_one_clear_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for name, text in {"t.txt": "a photo.\n", "t.tar": "a photo.\n", "empty.txt": "\n", "train.csv": "a,b\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder").mkdir()
    code, _, err = run_command(capsys, *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".safetensors")]


def test_an_interruption_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("pkgutil.resolve_name", interrupted)
    assert run_command(capsys, "train", "--recipe", "emoji") == (130, "", "clipfast train: interrupted\n")


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    code, _, err = run_command(capsys, "train", "--recipe", "emoji")
    assert code == 2
    assert "install what it needs: pip install 'clipfast[data,eval]'" in err.splitlines()[-1]


def test_run_is_named_after_its_recipe(capsys, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(f'train-data = "{shards}"\nmodel = "{TINY}"\nepochs = 1\nbatch-size = 24')
    code, _, err = run_command(capsys, "train", "--recipe", "mine.toml")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-2")
