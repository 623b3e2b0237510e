"""The command line: what it teaches, and what it says when something is wrong."""

import json
import pathlib
import sys

import pytest

from clipfast.cli import COMMANDS

from .conftest import TINY, run_command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ["train", "eval", "verify", "plan", "inspect", "bench", "image-text shards"]),
        ("train", ["--recipe", "--resume", "--batch-size", "(default: 256)", "Example: clipfast train --recipe emoji"]),
        ("eval zeroshot", ["--templates", "plain, simple (7), openai (80)", "Example: clipfast eval zeroshot"]),
        ("plan", ["clipfast plan --pairs 32768", "--check", "exit code", "These are predictions"]),
        ("bench", ["loss", "layer_norm", "tune"]),
    ],
)
def test_help_teaches(capsys, arguments, expected):
    code, out, _ = run_command(capsys, *arguments.split(), "--help")
    assert code == 0
    assert [text for text in expected if text not in out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_table_exist(capsys, command):
    code, out, _ = run_command(capsys, command, "--help")
    assert code == 0
    assert out.startswith(f"usage: clipfast {command}")


EMOJI = ["train", "--recipe", "emoji"]
EVAL = ["eval", "zeroshot", "--data", "x"]
BAD = [
    (["train"], "--train-data is needed"),
    (["train", "--recipe", "emojis"], "no recipe 'emojis': neither a file nor one of emoji"),
    ([*EMOJI, "--batch-size", "0"], "--batch-size must be more than 0, got 0"),
    ([*EMOJI, "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
    ([*EMOJI, "--micro-batch-size", "0"], "--micro-batch-size must be more than 0, got 0"),
    ([*EMOJI, "--micro-batch-size", "-4"], "--micro-batch-size must be more than 0, got -4"),
    ([*EMOJI, "--micro-batch-size", "many"], "--micro-batch-size: must be int or 'auto', got 'many'"),
    ([*EMOJI, "--micro-batch-size", "1.5"], "--micro-batch-size: must be int or 'auto', got '1.5'"),
    ([*EMOJI, "--model", "ViT-Z"], "unknown model 'ViT-Z'; known: RN50"),
    ([*EMOJI, "--workers", "3"], "2 shard(s) cannot feed 3 data workers"),
    (["train", "--train-data", "missing-{0..2}.tar"], "no such shard: missing-0.tar (3 of 3 are missing)"),
    (["train", "--resume", "nowhere"], "no checkpoint at nowhere"),
    ([*EMOJI, "--unique-by", "breed"], "has no 'breed' in its json; it has category, hexcode"),
    ([*EMOJI, "--backend", "triton"], "backend='triton' cannot run on a cpu tensor"),
    ([*EVAL, "--model", "ViT-B-32"], "has random weights: give its checkpoint with --pretrained, or a run's folder"),
    ([*EVAL, "--model", "local-dir:nowhere"], "is not a model configuration that can be read"),
    ([*EVAL, "--model", "x.pt", "--templates", "funny"], "--templates must be one of plain, simple, openai or a file"),
    ([*EVAL, "--model", "x.pt", "--templates", "t.txt"], "template 'a photo.' in t.txt has no {} for the class name"),
    ([*EVAL, "--model", "x.pt", "--classnames", "funny"], "--classnames must be 'imagenet' or a file, got 'funny'"),
    (["plan", "--pairs", "0"], "argument --pairs: must be more than 0, got 0"),
    (["plan", "--gpus", "-2"], "argument --gpus: must be more than 0, got -2"),
    (["plan", "--embed-dim", "0"], "argument --embed-dim: must be more than 0, got 0"),
    (["plan", "--embed-dim", "8", "--model", "RN50"], "--embed-dim is the model's own with --model: leave it out"),
    (["plan", "--pairs", "many"], "argument --pairs: invalid int value: 'many'"),
    (["plan", "--model", "ViT-X"], "unknown model 'ViT-X'; known: "),
    (["plan", "--dtype", "fp8"], "--dtype: unknown 'fp8'; known: fp32, fp16, bf16"),
    (
        ["plan", "--card", "v100"],
        "--card: unknown 'v100'; known: a100, h100, h200, b200. For another, take the nearest",
    ),
    (["plan", "--tflops", "0"], "argument --tflops: must be more than 0, got 0"),
    (["plan", "--memory-gb", "nan"], "argument --memory-gb: must be more than 0, got nan"),
    (["plan", "--latency-us", "-1"], "argument --latency-us: must be at least 0, got -1"),
    (["plan", "--gpus-per-node", "0"], "argument --gpus-per-node: must be more than 0, got 0"),
    (["plan", "--check", "--gpus", "9"], "--gpus must be at most 8, got 9"),
    (["plan", "--check", "--pairs", "32768"], "--pairs must be at most 16384, got 32768"),
    (["plan", "--check", "--card", "h100"], "--card has no effect with --check: leave it out"),
    (["plan", "--json", "nowhere/plan.json"], "no folder nowhere to write plan.json in"),
    ([], "the following arguments are required: COMMAND"),
    (["trian"], "invalid choice: 'trian' (choose from 'train', 'eval'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:45] for _, message in BAD])
def test_bad_input_is_one_clear_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("a photo.\n")
    code, _, err = run_command(capsys, *arguments)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".safetensors")]
    assert left == []


def test_train_then_evaluate(capsys, tmp_path, shards):
    options = "--name run --model ViT-T-8-32 --batch-size 8 --epochs 1 --warmup 2 --lr 1e-3"
    code, out, err = run_command(capsys, "train", "--train-data", shards, "--logs", str(tmp_path), *options.split())
    assert code == 0, err
    assert json.loads(out)["steps"] == 6
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n{}\n")
    data = ["--data", shards, "--label-by", "label", "--group-by", "category"]
    evaluation = ["eval", "zeroshot", *data, "--templates", str(tmp_path / "templates.txt")]
    path = tmp_path / "r.json"
    code, out, err = run_command(capsys, *evaluation, "--model", f"local-dir:{tmp_path / 'run'}", "--json", str(path))
    assert code == 0, err
    results = json.loads(out)
    assert results["images"] == 48
    assert results["classes"] == 24
    assert sorted(results["by_group"]) == ["even", "odd"]
    assert json.loads(path.read_text()) == results
    # the same checkpoint, by name and path
    weights = str(tmp_path / "run/checkpoints/epoch_latest.pt")
    code, out, _ = run_command(capsys, *evaluation, "--model", "ViT-T-8-32", "--pretrained", weights)
    assert code == 0
    assert json.loads(out)["zero_shot"] == results["zero_shot"]


def test_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    code, _, err = run_command(capsys, "train", "--recipe", "emoji")
    assert code == 2
    assert "install what it needs: pip install 'clipfast[data,eval]'" in err.splitlines()[-1]


def test_run_is_named_after_its_recipe(capsys, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("mine.toml").write_text(f'train-data = "{shards}"\nmodel = "{TINY}"\nepochs = 1\nbatch-size = 24')
    code, _, err = run_command(capsys, "train", "--recipe", "mine.toml")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine-2")
