"""OpenCLIP's training flags: for each, clipfast has the same option, translates it, ignores it, or refuses it."""

import argparse
import dataclasses
import functools
import itertools
import re
from pathlib import Path
from unittest import mock

import pytest

from clipfast.cli.open_clip_flags import FLAGS, page, translated
from clipfast.train import TrainConfig, read_recipe

from ..small_runs import TINY, commands, refusal_of
from .test_recipes import printed_options

# Flags that take a value, each with a value and with the other flags that it needs. All other flags are switches.
TYPED = """
--train-data c.tar
--train-data-upsampling-factors 1::2 --train-data a.tar::b.tar
--val-data val.tar
--train-num-samples 512
--val-num-samples 64
--csv-separator ,
--csv-img-key file
--csv-caption-key words
--image-key jpg;png
--max-image-pixels 1000000
--text-key txt;caption
--json-text-key long;short
--json-text-key-probs 0.75 0.25 --json-text-key long;short
--imagenet-val imagenet
--imagenet-v2 v2
--cache-dir cache
--logs somewhere
--name mine
--workers 2
--batch-size 128
--epochs 3
--epochs-cooldown 1 --lr-scheduler const-cooldown
--lr 1e-4
--lr-cooldown-end 1e-6 --lr-scheduler const-cooldown --epochs-cooldown 2
--lr-cooldown-power 2.0 --lr-scheduler const-cooldown --epochs-cooldown 2
--lr-scheduler const
--beta1 0.8
--beta2 0.95
--eps 1e-7
--wd 0.1
--wd-exclude *positional_embedding
--momentum 0.5
--warmup 100
--opt nadamw
--opt-kwargs momentum_decay=0.01
--text-layer-decay 0.7
--image-layer-decay 0.8
--save-frequency 2
--zeroshot-frequency 1
--val-frequency 2
--val-retrieval-chunk-size 512
--val-retrieval-precision model
--precision amp_bfloat16
--model RN101
--pretrained openai
--lock-image-unlocked-groups 2 --lock-image
--lock-text-unlocked-layers 3 --lock-text
--image-mean 0.5 0.4 0.3
--image-std 0.2 0.3 0.4
--image-interpolation bilinear
--image-resize-mode squash
--aug-cfg scale=(0.4,1.0) gray_scale_prob=0.2
--force-context-length 16
--force-image-size 64
--force-patch-dropout 0.5
--torchcompile-strategy task
--torchcompile-backend eager
--torchcompile-mode max-autotune
--device cpu
--dist-url env://
--dist-backend gloo
--report-to wandb
--wandb-notes none
--wandb-project-name mine
--fsdp-checkpoint sharded --fsdp
--seed 7
--grad-clip-norm 1.0
--log-every-n-steps 10
--log-metric-every-n-steps 5
--train-loss-ema-samples 1000
--loss-dist-impl gather
--naflex-num-train-image-tokens 100000 --use-naflex
--naflex-patch-sizes 16 32 --use-naflex
--naflex-patch-size-probs 1 2 --use-naflex --naflex-patch-sizes 16 32
--naflex-seq-lens 64 256 --use-naflex
--naflex-seq-len-probs 3 1 --use-naflex --naflex-seq-lens 64 256
--naflex-max-tokens-per-batch 4096 --use-naflex
--naflex-batch-divisor 4 --use-naflex
--naflex-loss-scale sqrt --use-naflex
--naflex-pad-multiple 64
--remote-sync memory://runs
--remote-sync-frequency 60
--remote-sync-protocol fsspec
--distill-model ViT-B-32 --distill-pretrained openai
--distill-pretrained openai --distill-model ViT-B-32
--fsdp-no-reshard-after-forward --fsdp
--fsdp-offload-cpu --fsdp
--lock-image-freeze-bn-stats --lock-image
"""
TRIED = {line.split()[0]: line.split() for line in TYPED.strip().splitlines()}
OPTION = {  # clipfast's options whose name differs from OpenCLIP's flag
    "--csv-img-key": "--image-key", "--csv-caption-key": "--text-key", "--no-set-device-rank": "--set-device-rank",
}  # fmt: skip
OUTSIDE = {"--resume", "--debug"}  # flags that are options of ``clipfast train`` and not of a run
GONE = {"--horovod", "--torchscript", "--trace"}  # flags that OpenCLIP has dropped since 3.3.0
PLAIN = ["--train-data", "shards.tar", "--model", TINY]


def flags(how):
    """Parametrise a test over OpenCLIP's training flags that clipfast treats in the way ``how``, such as "same"."""
    return pytest.mark.parametrize("flag", [flag for flag in FLAGS if FLAGS[flag].how == how and flag not in OUTSIDE])


def their_options() -> dict[str, argparse.Action]:
    """Return the training options of the installed OpenCLIP."""
    params = pytest.importorskip("open_clip_train.params")
    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=StopIteration)
    with parsing as parse, pytest.raises(StopIteration):
        params.parse_args([])
    return {action.option_strings[0]: action for action in parse.call_args.args[0]._actions if action.dest != "help"}


def numbers(text: str) -> list[float] | str:
    """Parse a training option as numbers, or return the text. Factors below 1 are divided by the largest of them."""
    try:
        found = [float(part) for part in re.split("::| ", text)]
    except ValueError:
        return text
    return found if len(found) == 1 or max(found) >= 1 else [number / max(found) for number in found]


class TestFlags:
    @pytest.fixture
    def printed(self, capsys):
        """Return a function that returns the options that ``clipfast train`` prints for the words of a command."""
        return functools.partial(printed_options, capsys, *PLAIN)

    def test_every_flag_of_theirs_is_in_the_table_and_on_the_page(self):
        assert set(their_options()) - GONE <= set(FLAGS)
        written = (Path(__file__).parents[2] / "docs" / "openclip-flags.md").read_text()
        assert written == page()
        assert written.count("\n| `--") == len(FLAGS) == 146

    @flags("same")
    def test_a_flag_that_is_the_same(self, flag, printed):
        words = TRIED.get(flag, [flag])
        value = " ".join(itertools.takewhile(lambda word: not word.startswith("--"), words[1:]))
        shown, origin = printed(*words)[OPTION.get(flag, flag)]
        assert numbers(shown) == numbers(value or str(not flag.startswith("--no-")))
        assert origin == "flag"

    def test_flags_that_change_nothing(self, printed):
        accepted = [flag for flag in FLAGS if FLAGS[flag].how == "accepted" and flag not in OUTSIDE]
        assert len(accepted) > 10
        assert printed(*itertools.chain(*(TRIED.get(flag, [flag]) for flag in accepted))) == printed()

    @flags("refused")
    def test_a_flag_that_is_refused_says_what_to_use(self, flag, capsys):
        note = FLAGS[flag].note
        assert any(word in note for word in ("use ", "--opt muon", "leave it out", "install "))
        err = refusal_of(capsys, "train", *PLAIN, flag, "1", "2")
        assert f"argument {flag}: " in err
        assert note in err

    def test_mapped_flags(self, printed):
        options = printed("--accum-freq", "4", "--batch-size", "32")
        assert (options["--batch-size"], options["--micro-batch-size"]) == (["128", "flag"], ["32", "flag"])
        options = printed("--dataset-type", "synthetic", "--train-num-samples", "512")
        assert options["--train-data"] == ["synthetic:512", "flag"]
        for words in ("--accum-freq 1", "--dataset-type webdataset", "--dataset-type csv", "--dataset-type auto"):
            assert printed(*words.split()) == printed()

    def test_of_small_factors_only_the_ratio_counts(self):
        for given, expected in (((0.001, 0.01), (0.1, 1.0)), ((1.0, 2.0), (1.0, 2.0))):
            options = translated({"train_data_upsampling_factors": given}, {}, resuming=False)
            assert options["train_data_upsampling_factors"] == pytest.approx(expected)

    def test_accumulation_of_a_recipe_and_of_a_checkpoint(self):
        for earlier, pairs in (({"batch_size": 64}, 64), ({}, 256)):
            options = translated({"accum_freq": 2}, earlier, resuming=False)
            assert options == {"batch_size": 2 * pairs, "micro_batch_size": pairs}
        for earlier, resuming in (({"batch_size": 128}, True), ({"global_batch_size": 32768}, False)):
            with pytest.raises(ValueError, match=r"--accum-freq 2 .*--batch-size"):
                translated({"accum_freq": 2}, earlier, resuming=resuming)

    @commands(r"""
--accum-freq 2 --micro-batch-size 8 => --accum-freq 2 and --micro-batch-size
--accum-freq 2 --global-batch-size 8 => --accum-freq 2 and --global-batch-size
--dataset-type synthetic => needs --train-num-samples
--dataset-type webdataset-audio => 'webdataset-audio'
--dist-url tcp://node:1234 => 'tcp://node:1234'.*torchrun
--dist-backend hccl => 'hccl'
--fsdp-checkpoint dcp => 'dcp'
--remote-sync-protocol ftp => 'ftp'
--val-retrieval-precision fp16 => 'fp16'
--precision fp16 => 'fp16'
--logs none => --logs none
--train-data-upsampling-factors 1::x => '1::x'
--aug-cfg scale => name=value, got 'scale'
--aug-cfg scale=(0.4,1) --hue 0.1 => leave one of them out
--aug-cfg scale=(0.4,1) --crop-scale 0.5 1 => --aug-cfg .* --crop-scale
""")
    def test_values_that_cannot_work(self, words, said, capsys):
        err = refusal_of(capsys, "train", *PLAIN, *words, "--print-config")
        assert re.search(said, err)

    def test_the_defaults_of_theirs_are_a_recipe(self):
        """The recipe openclip-defaults sets every option whose default in clipfast is not OpenCLIP's."""
        recipe = read_recipe("openclip-defaults")
        ours = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
        theirs = their_options()
        assert len(set(theirs) & set(FLAGS)) > 60
        # In OpenCLIP, None, False and '' stand for unused options, or for values that both packages take from the
        # paper.
        same = {"--logs", "--csv-separator", "--csv-img-key", "--csv-caption-key", "--device"}
        same.add("--precision")  # OpenCLIP's main branch has changed this default
        for flag, action in theirs.items():
            is_ours = flag in FLAGS and FLAGS[flag].how == "same"
            if is_ours and flag not in same and action.default:
                assert recipe.get(action.dest, ours.get(action.dest)) == action.default, flag
