"""OpenCLIP's flags: all of them are in the table, each is tried, and the page of them is what the code writes."""

import argparse
import dataclasses
import importlib
import importlib.util
import os
from pathlib import Path
from unittest import mock

import pytest

from clipfast.cli import main
from clipfast.training import TrainConfig, read_recipe
from clipfast.training.open_clip_flags import FLAGS, LATER, add_arguments, page, translated

from .conftest import TINY, run_command
from .test_recipes import rows

ROOT = Path(__file__).parents[2]
# A value for each flag that takes one. A flag that is not here is a switch.
VALUES = {
    "--train-data-upsampling-factors": "1::2", "--val-data": "val.tar", "--train-num-samples": "512",
    "--val-num-samples": "64", "--dataset-type": "webdataset", "--csv-separator": ",", "--csv-img-key": "file",
    "--csv-caption-key": "words", "--image-key": "jpg;png", "--max-image-pixels": "1000000",
    "--text-key": "txt;caption", "--json-text-key": "long;short", "--imagenet-val": "imagenet",
    "--imagenet-v2": "v2", "--cache-dir": "cache", "--logs": "somewhere", "--name": "mine", "--workers": "2",
    "--batch-size": "128", "--epochs": "3", "--lr": "1e-4", "--beta1": "0.8",
    "--beta2": "0.95", "--eps": "1e-7", "--wd": "0.1", "--momentum": "0.5", "--warmup": "100", "--opt": "nadamw",
    "--opt-kwargs": "momentum_decay=0.01", "--text-layer-decay": "0.7", "--image-layer-decay": "0.8",
    "--wd-exclude": "*positional_embedding", "--lr-scheduler": "const",
    "--save-frequency": "2", "--zeroshot-frequency": "1", "--val-frequency": "2", "--val-retrieval-chunk-size": "512",
    "--val-retrieval-precision": "model", "--precision": "amp_bfloat16", "--model": "RN101", "--pretrained": "openai",
    "--image-mean": "0.5 0.4 0.3", "--image-std": "0.2 0.3 0.4", "--image-interpolation": "bilinear",
    "--image-resize-mode": "squash", "--aug-cfg": "scale=(0.4,1.0) gray_scale_prob=0.2", "--force-context-length": "16",
    "--force-image-size": "64", "--force-patch-dropout": "0.5", "--torchcompile-strategy": "task",
    "--torchcompile-backend": "eager", "--torchcompile-mode": "max-autotune", "--accum-freq": "4", "--device": "cpu",
    "--dist-url": "env://", "--dist-backend": "gloo", "--seed": "7", "--grad-clip-norm": "1.0",
    "--log-every-n-steps": "10", "--train-loss-ema-samples": "1000", "--loss-dist-impl": "gather",
}  # fmt: skip
# Flags that go together with others.
WITH = {
    "--train-data-upsampling-factors": {"--train-data": "a.tar::b.tar"},
    "--json-text-key-probs": {"--json-text-key": "long;short"},
    "--epochs-cooldown": {"--lr-scheduler": "const-cooldown"},
    "--lr-cooldown-end": {"--lr-scheduler": "const-cooldown", "--epochs-cooldown": "2"},
    "--lr-cooldown-power": {"--lr-scheduler": "const-cooldown", "--epochs-cooldown": "2"},
    "--lock-image-unlocked-groups": {"--lock-image": ""},
    "--lock-image-freeze-bn-stats": {"--lock-image": ""},
    "--lock-text-unlocked-layers": {"--lock-text": ""},
}
VALUES |= {
    "--train-data": "c.tar", "--json-text-key-probs": "0.75 0.25", "--epochs-cooldown": "1",
    "--lr-cooldown-end": "1e-6", "--lr-cooldown-power": "2.0", "--lock-image-unlocked-groups": "2",
    "--lock-text-unlocked-layers": "3",
}  # fmt: skip
SHOWN = {
    "--train-data-upsampling-factors": "1.0 2.0",
    "--lr": "0.0001",
    "--eps": "1e-07",
    "--lr-cooldown-end": "1e-06",
}  # otherwise than it is typed
OPTION = {  # of another name than the flag
    "--csv-img-key": "--image-key", "--csv-caption-key": "--text-key", "--no-set-device-rank": "--set-device-rank",
}  # fmt: skip
OUTSIDE = {"--resume", "--debug"}  # of the command and not of the run: their tests follow
VALUES |= {
    "--report-to": "wandb", "--wandb-notes": "none", "--wandb-project-name": "mine", "--fsdp-checkpoint": "sharded",
    "--remote-sync": "memory://runs", "--remote-sync-frequency": "60", "--remote-sync-protocol": "fsspec",
    "--log-metric-every-n-steps": "5", "--distill-model": "ViT-B-32", "--distill-pretrained": "openai",
}  # fmt: skip
WITH |= {f"--fsdp-{name}": {"--fsdp": ""} for name in ("no-reshard-after-forward", "offload-cpu", "checkpoint")}
WITH |= {"--distill-model": {"--distill-pretrained": "openai"}, "--distill-pretrained": {"--distill-model": "ViT-B-32"}}
GONE = {"--horovod", "--torchscript", "--trace"}  # from OpenCLIP 3.3.0 on


def their_parser() -> argparse.ArgumentParser:
    """The parser of OpenCLIP: of the checkout that OPEN_CLIP_SOURCE names, or of the installed package."""
    if "OPEN_CLIP_SOURCE" in os.environ:
        path = Path(os.environ["OPEN_CLIP_SOURCE"], "src/open_clip_train/params.py")
        spec = importlib.util.spec_from_file_location("their_params", path)
        params = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(params)
    else:
        params = pytest.importorskip("open_clip_train.params")
    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=StopIteration)
    with parsing as parse, pytest.raises(StopIteration):
        params.parse_args([])
    return parse.call_args.args[0]


def their_options() -> dict[str, argparse.Action]:
    return {action.option_strings[0]: action for action in their_parser()._actions if action.dest != "help"}


def test_every_flag_of_theirs_is_in_the_table():
    theirs = set(their_options())
    assert theirs - GONE <= set(FLAGS)
    if "OPEN_CLIP_SOURCE" in os.environ:
        assert theirs == set(FLAGS) - set(LATER)
    assert len(FLAGS) == 146


def test_the_page_is_what_the_code_writes():
    assert (ROOT / "docs" / "openclip-flags.md").read_text() == page()
    assert page().count("\n| `--") == 146


def attempt(capsys, *words):
    """Exit code, printed options and errors of ``clipfast train`` with the words of a command."""
    code, out, err = run_command(capsys, "train", *words, "--print-config")
    return code, rows(out) if code == 0 else {}, err


def typed(flag):
    """The words of a command that tries a flag, and those that go with it."""
    together = [word for other, value in WITH.get(flag, {}).items() for word in (other, *value.split())]
    return [*together, flag, *VALUES.get(flag, "").split()]


SAME = [flag for flag, rule in FLAGS.items() if rule.how == "same"]
PLAIN = ["--train-data", "shards.tar", "--model", TINY]


@pytest.mark.parametrize("flag", [flag for flag in SAME if flag not in OUTSIDE])
def test_a_flag_that_is_the_same(flag, capsys):
    code, options, err = attempt(capsys, *PLAIN, *typed(flag))
    assert code == 0, err
    default = {"--no-set-device-rank": "False"}.get(flag, "True")
    shown = SHOWN.get(flag, VALUES.get(flag, default))
    assert options[OPTION.get(flag, flag)] == [shown, "flag"]


@pytest.mark.parametrize("flag", [flag for flag, rule in FLAGS.items() if rule.how == "accepted"])
def test_a_flag_that_changes_nothing(flag, capsys):
    code, options, err = attempt(capsys, *PLAIN, *typed(flag))
    assert code == 0, err
    assert options == attempt(capsys, *PLAIN)[1]


@pytest.mark.parametrize("flag", [flag for flag, rule in FLAGS.items() if rule.how == "refused"])
@pytest.mark.parametrize("values", [[], ["1"], ["1", "2"]])
def test_a_flag_that_is_refused_says_what_to_use(flag, values, capsys):
    code, _, err = attempt(capsys, *PLAIN, flag, *values)
    assert code == 2
    assert err.startswith(f"clipfast train: error: argument {flag}: this flag of OpenCLIP is not supported: ")
    assert FLAGS[flag].note in err
    assert any(word in FLAGS[flag].note for word in ("use ", "--opt muon", "leave it out", "install "))


def test_mapped_flags(capsys):
    mapped = {flag for flag, rule in FLAGS.items() if rule.how == "mapped"}
    assert mapped == {"--accum-freq", "--dataset-type"}
    _, options, _ = attempt(capsys, *PLAIN, "--accum-freq", "4", "--batch-size", "32")
    assert options["--batch-size"] == ["128", "flag"]
    assert options["--micro-batch-size"] == ["32", "flag"]
    assert attempt(capsys, *PLAIN, "--accum-freq", "1")[1] == attempt(capsys, *PLAIN)[1]
    _, options, _ = attempt(capsys, "--dataset-type", "synthetic", "--train-num-samples", "512")
    assert options["--train-data"] == ["synthetic:512", "flag"]
    for kind in ("webdataset", "csv", "auto"):
        assert attempt(capsys, *PLAIN, "--dataset-type", kind)[1] == attempt(capsys, *PLAIN)[1]


def test_of_small_factors_only_the_ratio_counts():
    for given, expected in (((0.001, 0.01), (0.1, 1.0)), ((0.5, 1.0), (0.5, 1.0)), ((1.0, 2.0), (1.0, 2.0))):
        options = translated({"train_data_upsampling_factors": given}, {}, resuming=False)
        assert options["train_data_upsampling_factors"] == pytest.approx(expected)


def test_accumulation_of_a_recipe_and_of_a_checkpoint():
    assert translated({"accum_freq": 2}, {"batch_size": 64}, resuming=False) == {
        "batch_size": 128,
        "micro_batch_size": 64,
    }
    assert translated({"accum_freq": 2}, {}, resuming=False) == {"batch_size": 512, "micro_batch_size": 256}
    with pytest.raises(ValueError, match="--accum-freq 2 with --resume needs --batch-size"):
        translated({"accum_freq": 2}, {"batch_size": 128}, resuming=True)
    with pytest.raises(ValueError, match="--accum-freq 2 would replace --global-batch-size 32768: give --batch-size"):
        translated({"accum_freq": 2}, {"global_batch_size": 32768}, resuming=False)
    assert translated({"accum_freq": 2, "batch_size": 8}, {"global_batch_size": 32}, resuming=False) == {
        "batch_size": 16,
        "micro_batch_size": 8,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--accum-freq", "2", "--micro-batch-size", "8"],
            "--accum-freq 2 and --micro-batch-size both say how",
        ),
        (["--accum-freq", "2", "--global-batch-size", "8"], "--accum-freq 2 and --global-batch-size both say how"),
        (["--dataset-type", "synthetic"], "--dataset-type synthetic needs --train-num-samples"),
        (["--dataset-type", "webdataset-audio"], "invalid choice: 'webdataset-audio'"),
        (["--dist-url", "tcp://node:1234"], "'tcp://node:1234': start by torchrun, and give the address to its"),
        (["--dist-backend", "hccl"], "invalid choice: 'hccl'"),
        (["--fsdp-checkpoint", "dcp"], "invalid choice: 'dcp'"),
        (["--remote-sync-protocol", "ftp"], "invalid choice: 'ftp'"),
        (["--val-retrieval-precision", "fp16"], "invalid choice: 'fp16'"),
        (["--precision", "fp16"], "invalid choice: 'fp16'"),
        (["--logs", "none"], "--logs none: a run needs a folder"),
        (["--train-data-upsampling-factors", "1::x"], "needs float values, got '1::x'"),
        (["--aug-cfg", "scale"], "--aug-cfg must be name=value, got 'scale'"),
        (["--aug-cfg", "scale=(0.4,1)", "--hue", "0.1"], "--aug-cfg takes the place of --hue: leave one of them out"),
        (["--aug-cfg", "scale=(0.4,1)", "--crop-scale", "0.5", "1"], "--aug-cfg takes the place of --crop-scale"),
    ],
)
def test_values_that_cannot_work(words, message, capsys):
    code, _, err = attempt(capsys, *PLAIN, *words)
    assert code == 2
    assert message in err


def test_one_parser_takes_every_flag():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = {word for action in parser._actions for word in action.option_strings}
    assert {flag for flag, rule in FLAGS.items() if rule.how != "same"} <= known


def test_the_defaults_of_theirs_are_a_recipe():
    """A flag that is left out means something else here, unless the recipe says it."""
    recipe = read_recipe("openclip-defaults")
    ours = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    theirs = their_options()
    assert len(set(theirs) & set(FLAGS)) > 60
    # None, False and '' there stand for what is not asked for, or for values that both take from the paper.
    same = {"--logs", "--csv-separator", "--csv-img-key", "--csv-caption-key", "--device"}
    if "OPEN_CLIP_SOURCE" not in os.environ:
        same |= {"--precision"}  # which main has changed
    for flag, action in theirs.items():
        key = action.dest
        if FLAGS.get(flag, FLAGS["--use-naflex"]).how != "same" or flag in same or not action.default:
            continue
        assert recipe.get(key, ours.get(key)) == action.default, flag


def test_debug_shows_where_an_error_was_raised(tmp_path):
    arguments = ["train", "--train-data", str(tmp_path / "none.tar"), "--logs", str(tmp_path)]
    assert main(arguments) == 2
    with pytest.raises(ValueError, match="no such shard"):
        main([*arguments, "--debug"])
