"""OpenCLIP's training commands: each of its flags, their effects, and commands from its documentation."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.cli.main import main
from clipfast.cli.open_clip_flags import FLAGS, page, translated
from clipfast.data import ANY_ORDER
from clipfast.distributed.world import World, _places
from clipfast.evaluate import zero_shot
from clipfast.evaluate.imagenet import imagenet_set
from clipfast.models.images import ImageError
from clipfast.runs.folder import RunFolder
from clipfast.train import TrainConfig, read_recipe
from clipfast.train.build import Distillation, bare_model, build_tokenizer
from clipfast.train.data import pair_batches, sources_of
from clipfast.train.logs import log, logging_to
from clipfast.train.loop import train
from clipfast.train.optim import make_optimizer
from clipfast.train.preflight import preflight

from ..processes import run_ranks
from ..small_runs import COLOURS, TINY, cases, commands, picture, run_command, sample, write_shard
from . import test_training
from .test_recipes import rows
from .test_training import losses, saved_step

CPU = torch.device("cpu")
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
OPTION = {  # options whose name differs from the flag
    "--csv-img-key": "--image-key", "--csv-caption-key": "--text-key", "--no-set-device-rank": "--set-device-rank",
}  # fmt: skip
OUTSIDE = {"--resume", "--debug"}  # options of the command and not of the run, which have tests elsewhere
GONE = {"--horovod", "--torchscript", "--trace"}  # flags that OpenCLIP has dropped since 3.3.0
PLAIN = ["--train-data", "shards.tar", "--model", TINY]


def flags(how):
    """Parametrise a test over the flags of a kind of OpenCLIP's trainer."""
    return pytest.mark.parametrize("flag", [flag for flag in FLAGS if FLAGS[flag].how == how and flag not in OUTSIDE])


def their_options() -> dict[str, argparse.Action]:
    """Return the training options of the installed OpenCLIP."""
    params = pytest.importorskip("open_clip_train.params")
    parsing = mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=StopIteration)
    with parsing as parse, pytest.raises(StopIteration):
        params.parse_args([])
    return {action.option_strings[0]: action for action in parse.call_args.args[0]._actions if action.dest != "help"}


def numbers(text: str) -> list[float] | str:
    """Parse a training option as numbers, or return the text. Of several below 1, only the ratio counts."""
    try:
        found = [float(part) for part in re.split("::| ", text)]
    except ValueError:
        return text
    return found if len(found) == 1 or max(found) >= 1 else [number / max(found) for number in found]


class TestFlags:
    @pytest.fixture
    def printed(self, capsys):
        """Return a function that returns the options that ``clipfast train`` prints for the words of a command."""

        def print_options(*words):
            """Return the options that ``clipfast train`` prints for these words of OpenCLIP's trainer."""
            code, out, err = run_command(capsys, "train", *PLAIN, *words, "--print-config")
            assert code == 0, err
            return rows(out)

        return print_options

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
        code, _, err = run_command(capsys, "train", *PLAIN, flag, "1", "2")
        assert code == 2
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
        code, _, err = run_command(capsys, "train", *PLAIN, *words, "--print-config")
        assert code == 2
        assert re.search(said, err)

    def test_the_defaults_of_theirs_are_a_recipe(self):
        """An omitted flag has another default in clipfast, unless the recipe sets it."""
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


@pytest.fixture
def config(shards, tmp_path):
    """Return a function that returns training options of four steps an epoch, without data workers."""

    def make(name="run", **options):
        """Return the options of a small training run, with these changes."""
        made = test_training.config(shards, tmp_path, **{"workers": 0, "epochs": 1} | options)
        return dataclasses.replace(made, name=name)

    return make


@pytest.fixture
def refused(config, tmp_path):
    """Return a function that asserts that a training run is refused before it starts."""

    def refuse(message, **options):
        """Assert that a training run with these options is refused with ``message`` before it starts."""
        with pytest.raises(ValueError, match=message):
            preflight(config(**options), RunFolder(tmp_path / "x"), {})

    return refuse


@pytest.fixture
def one_prompt(monkeypatch):
    """Use one prompt per class in place of 80 when training evaluates on ImageNet."""
    monkeypatch.setattr("clipfast.evaluate.imagenet.OPENAI_IMAGENET_TEMPLATES", ("{}",))
    monkeypatch.setattr(zero_shot, "TEMPLATES", zero_shot.TEMPLATES | {"openai": ("{}",)})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Make small data for each path in a command of OpenCLIP's trainer."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "00000.tar", [sample(index) for index in range(24)])
    write_shard(folder / "00001.tar", [sample(index, png=picture(100 + index)) for index in range(24)])
    pairs = ["filepath\ttitle"]
    for index in range(24):
        (folder / f"{index}.png").write_bytes(picture(index))
        pairs.append(f"{folder}/{index}.png\ta {COLOURS[index % 8]} thing {index}")
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    for number in range(1000):  # images of ImageNet, which are all equal
        (folder / "val" / f"n{number:08d}").mkdir(parents=True)
        (folder / "val" / f"n{number:08d}" / "1.png").symlink_to(folder / "0.png")
    torch.save(bare_model(TrainConfig("x.tar", model=TINY), {}, CPU).state_dict(), folder / "weights.pt")
    run = "--train-num-samples 16 --batch-size 8 --epochs 1 --warmup 1 --workers 0 --name before --model"
    run = f"train --train-data {folder}/pairs.csv --logs {folder} {run} {TINY}"
    assert main(run.split()) == 0
    return {
        "SHARDS": f"{folder}/{{00000..00001}}.tar", "TABLE": f"{folder}/pairs.csv", "IMAGENET": f"{folder}/val",
        "WEIGHTS": f"{folder}/weights.pt", "CHECKPOINT": f"{folder}/before/checkpoints/epoch_latest.pt",
        "REMOTE": f"file://{folder}/remote",
    }  # fmt: skip


class TestModel:
    def test_a_run_goes_on_with_the_sizes_that_it_began_with(self, config):
        forced = {"force_image_size": (48,), "force_context_length": 16}
        model = bare_model(config(**forced | {"force_image_size": (48, 48), "force_quick_gelu": True}), {}, CPU)
        assert (model.visual.image_size, model.context_length, model.config.quick_gelu) == (48, 16, True)
        run, _ = train(config(**forced))
        again, _ = train(config(**forced, epochs=2), run.latest)
        assert saved_step(again.path) == 8
        with pytest.raises(ValueError, match=r"--force-image-size \[48\] -> \[32\]"):
            train(config(**forced | {"force_image_size": (32,)}, epochs=3), run.latest)

    def test_preprocessing(self, config):
        given = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5,), "image_interpolation": "bilinear"}
        options = config(**given, image_resize_mode="squash")
        for saved in ({}, {"model_config": bare_model(options, {}, CPU).config.to_dict(), "preprocess_cfg": {}}):
            visual = bare_model(options, saved, CPU).visual
            assert (visual.image_mean, tuple(visual.image_std)) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
            assert (visual.preprocess_cfg["interpolation"], visual.resize_mode) == ("bilinear", "squash")

    def test_weights_in_bfloat16_with_norms_in_float32(self, config):
        run, _ = train(config(precision="bf16"))
        model = bare_model(config(precision="bf16"), {}, CPU)
        assert model.text_projection.dtype == torch.bfloat16
        assert model.ln_final.weight.dtype == model.logit_scale.dtype == torch.float32
        train(config(precision="bf16", epochs=2), run.latest)
        assert losses(run)[-1] < losses(run)[0]
        assert read_checkpoint(run.latest)["state_dict"]["text_projection"].dtype == torch.bfloat16

    def test_an_optimizer_of_timm(self, config):
        optim = pytest.importorskip("timm.optim")
        model = bare_model(config(), {}, CPU)
        assert isinstance(make_optimizer(config(opt="timm/lamb"), model), optim.Lamb)
        with pytest.raises(ValueError, match=r"--opt timm/lambda: .*lamb"):
            make_optimizer(config(opt="timm/lambda"), model)


class TestData:
    @pytest.fixture
    def transform(self, config):
        """Return a function that returns the image transform of a training run."""

        def of_run(**changes):
            """Return the image transform of a training run with these options."""
            options = config(**changes)
            model = bare_model(options, {}, CPU)
            sources = sources_of(options, options.train_data.split("::"))
            return pair_batches(options, sources, ANY_ORDER, model, build_tokenizer(options, model)).transform

        return of_run

    @pytest.mark.parametrize("whole", [{}, {"crop_scale": (1.0, 1.0)}, {"decode_on_device": True}])
    def test_larger_images_are_left_out(self, whole, transform, refused):
        photograph = io.BytesIO()
        Image.open(io.BytesIO(picture(0))).save(photograph, "JPEG")
        for image in (picture(0), photograph.getvalue()):
            for pixels in (0, 24 * 24):
                transform(max_image_pixels=pixels, **whole)(image)
            with pytest.raises(ImageError, match=r"24x24 pixels, .*575"):
                transform(max_image_pixels=575, **whole)(image)
        refused("not one of 4 pairs", max_image_pixels=575, **whole)

    def test_crops_and_colours_of_aug_cfg(self, transform, refused):
        crops = transform(aug_cfg=("scale=(0.1,0.2)", "ratio=(0.5,0.6)", "gray_scale_prob=1.0"))
        torch.manual_seed(0)
        for _ in range(20):
            left, top, right, bottom = crops.box(1000, 1000)
            assert 0.09 < (right - left) * (bottom - top) / 1e6 < 0.21
            assert 0.49 < (right - left) / (bottom - top) < 0.61
        grey, coloured = crops(picture(1)), transform()(picture(1))
        assert torch.equal(grey[0], grey[1])
        assert not torch.equal(coloured[0], coloured[1])
        refused(r"re_prob=0\.1, .*timm", aug_cfg=("re_prob=0.1",))


class TestProcesses:
    @pytest.mark.parametrize(
        ("tasks", "node", "on_machine"), [("4(x3)", 2, 4), ("4(x2),3", 2, 3), ("2,3", 1, 3), ("1", 0, 1)]
    )
    def test_processes_of_srun(self, tasks, node, on_machine):
        slurm = {
            "SLURM_STEP_NUM_TASKS": "11", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": str(node),
            "SLURM_STEP_TASKS_PER_NODE": tasks, "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
        }  # fmt: skip
        assert _places(slurm) == (9, 11, 1, on_machine)
        torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        assert _places(slurm | torchrun) == (1, 2, 0, 1)
        assert _places({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1, 0, 1)  # a batch script without srun
        del slurm["MASTER_ADDR"]
        with pytest.raises(ValueError, match=r"11 processes, .*MASTER_ADDR"):
            _places(slurm)

    def test_a_log_for_each_machine(self, tmp_path):
        for rank, local_rank in ((0, 0), (2, 0), (3, 1)):
            with logging_to(RunFolder(tmp_path), World(rank, 4, local_rank, 2), by_machine=True):
                log.warning("something of rank %d", rank)
        assert {path.name for path in tmp_path.iterdir()} == {"out-0", "out-2"}
        for rank in (0, 2):
            assert f"something of rank {rank}\n" in (tmp_path / f"out-{rank}").read_text()


@pytest.mark.usefixtures("one_prompt")
class TestEvaluation:
    def test_how_often_a_run_evaluates_logs_and_saves(self, places, shards, config):
        often = {"zeroshot_frequency": 2, "val_frequency": 5, "log_every_n_steps": 3, "log_metric_every_n_steps": 1}
        given = {"imagenet_val": places["IMAGENET"], "val_data": shards, "save_frequency": 2}
        run, _ = train(config(epochs=3, **given, **often))
        lines = [line for line in run.metrics() if "imagenet" in line]
        assert [line["step"] for line in lines] == [8, 12]  # after the second epoch, and after the last one
        assert [line["step"] for line in run.metrics() if "eval" in line] == [12]
        # All images are equal, so one class is the best for all of them, and five classes are in the top five.
        expected = {"imagenet-zeroshot-val-top1": 0.001, "imagenet-zeroshot-val-top5": 0.005}
        assert lines[-1]["imagenet"] == expected
        assert expected.items() <= json.loads((run.path / "results.json").read_text()).items()
        log = (run.path / "out.log").read_text()
        assert re.search("Eval Epoch: 3 .*imagenet-zeroshot-val-top1: 0.0010\t", log)
        assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, 13))
        assert log.count("Train Epoch:") == 6  # steps 3, 4, 6, 8, 9 and 12
        assert {path.name for path in run.checkpoints.glob("epoch_*")} == {
            "epoch_2.pt",
            "epoch_3.pt",
            "epoch_latest.pt",
        }

    def test_a_run_that_neither_evaluates_nor_keeps_epochs(self, places, shards, config):
        never = {"zeroshot_frequency": 0, "val_frequency": 0, "save_frequency": 1}
        run, _ = train(
            config(imagenet_val=places["IMAGENET"], val_data=shards, epochs=2, delete_previous_checkpoint=True, **never)
        )
        assert not any("imagenet" in line or "eval" in line for line in run.metrics())
        assert {path.name for path in run.checkpoints.glob("epoch_*")} == {"epoch_2.pt", "epoch_latest.pt"}

    def test_classes_of_v2_are_numbers(self, tmp_path):
        for number in range(1000):
            (tmp_path / "ImageNetV2-matched-frequency" / str(number)).mkdir(parents=True)
        assert imagenet_set(str(tmp_path)).data.endswith("ImageNetV2-matched-frequency")

    def test_what_is_not_imagenet_is_refused_before_training(self, refused, tmp_path):
        (tmp_path / "few" / "cat").mkdir(parents=True)
        refused("--imagenet-val: .*few has 1 sub-folders", imagenet_val=str(tmp_path / "few"))
        refused("--imagenet-v2: .*none is no folder", imagenet_v2=str(tmp_path / "none"))


class TestDistillation:
    @pytest.fixture
    def teacher(self, tmp_path, config):
        """Return the options of a training run with a teacher of the same shape and other weights."""
        torch.manual_seed(7)
        torch.save(bare_model(config(), {}, CPU).state_dict(), tmp_path / "teacher.pt")
        return {"distill_model": TINY, "distill_pretrained": str(tmp_path / "teacher.pt")}

    def test_the_loss_is_that_of_the_pairs_and_of_the_teacher(self, teacher, config):
        options = config(**teacher)
        student = bare_model(options, {}, CPU)
        distillation = Distillation(options, student, CPU, autocast=contextlib.nullcontext)
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        texts = build_tokenizer(options, student)([f"thing {number}" for number in range(8)])
        distillation.look(images, texts, 3)
        outputs = student(images, texts)

        def logits(image, text, scale):
            """Return the logits of student or teacher in float64, for both directions of the distillation loss."""
            dense = scale.double() * image.double() @ text.double().T
            return dense, dense.T

        right = torch.arange(8)
        both = zip(logits(*outputs), logits(*distillation.teacher(images, texts)), strict=True)
        expected = sum(F.cross_entropy(x, right) + F.cross_entropy(x, target.softmax(1)) for x, target in both) / 2
        assert distillation(*outputs).item() == pytest.approx(expected.item(), rel=1e-5)
        assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())

    def test_micro_batches_of_a_run_with_a_teacher(self, teacher, config):
        whole, in_parts = (
            train(config(name=f"{size}", micro_batch_size=size, pack_text=size is None, **teacher))[0]
            for size in (None, 3)
        )
        assert losses(whole) == pytest.approx(losses(in_parts), rel=1e-5)
        # The logits of the teacher are almost uniform: their cross-entropy comes on top, that of a guess among 8 pairs.
        assert losses(whole)[0] == pytest.approx(2 * math.log(8), abs=1.0)

    @cases("""
distill_pretrained=None: --distill-model and --distill-pretrained
distill_model=None: --distill-model and --distill-pretrained
distill_model=ViT-B-32: --distill-model ViT-B-32 has images of 224, and .* 32
force_context_length=8: texts of 16, and .* 8
distill_model=ViT-X: unknown model 'ViT-X'
cuda_graphs=True: --distill-model .* --cuda-graphs
""")
    def test_what_cannot_work(self, options, said, teacher, refused):
        refused(said, **teacher | options)


# Commands of OpenCLIP's README, its docs/script_examples and its tests. Each is below its name and, if it is refused,
# the error. Paths are replaced by small data.
DOCUMENTED = """
sample
--save-frequency 1 --zeroshot-frequency 1 --report-to tensorboard --train-data=TABLE --val-data=TABLE
--csv-img-key filepath --csv-caption-key title --imagenet-val=IMAGENET --warmup 10000 --batch-size=128
--lr=1e-3 --wd=0.1 --epochs=30 --workers=8 --model RN50

one node
--train-data SHARDS --train-num-samples 10968539 --dataset-type webdataset --batch-size 320 --precision amp
--workers 4 --imagenet-val IMAGENET

slurm
--save-frequency 1 --report-to tensorboard --train-data=SHARDS --warmup 2000 --batch-size=256
--epochs=32 --workers=8 --model ViT-B-32 --name ViT-B-32-Vanilla --seed 0 --local-loss --gather-with-grad

resume
--train-data=TABLE --val-data=TABLE --resume CHECKPOINT

coca: clipfast trains no captioner
--dataset-type csv --train-data TABLE --warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1
--workers 3 --model coca_ViT-L-14 --report-to wandb --coca-contrastive-loss-weight 0
--coca-caption-loss-weight 1 --log-every-n-steps 100

roberta: unknown model 'roberta-ViT-B-32'
--train-data=SHARDS --train-num-samples 3000000 --val-data=SHARDS --val-num-samples 10000
--dataset-type webdataset --batch-size 256 --warmup 2000 --epochs 10 --lr 5e-4 --precision amp --workers 6
--model roberta-ViT-B-32 --lock-text --lock-text-unlocked-layers 10 --name 10_unfrozen --report-to tensorboard

evaluate local
--val-data=TABLE --model RN101 --pretrained WEIGHTS

evaluate hosted
--imagenet-val IMAGENET --model ViT-B-32-quickgelu --pretrained WEIGHTS

urban sound: use OpenCLIP for audio
--model CLAP-HTSAT-tiny-Roberta-base-fused --pretrained laion --audio-zeroshot-split train --device cuda
--audio-zeroshot-dataset mteb/urbansound8K --audio-zeroshot-target-key classID
--audio-zeroshot-class-key class --batch-size 64 --workers 4

several sources
--train-data SHARDS::SHARDS --dataset-resampled

weighted sources
--train-data SHARDS::SHARDS --dataset-resampled --train-data-upsampling-factors=0.001::0.01

shorter epochs
--train-data SHARDS --train-num-samples 135646078 --dataset-resampled

no patch dropout
--train-data SHARDS --model ViT-B-32 --force-patch-dropout 0.

distillation
--train-data SHARDS --distill-model ViT-L-14 --distill-pretrained openai

accumulation
--train-data SHARDS --batch-size 64 --accum-freq 4 --grad-checkpointing --local-loss --gather-with-grad

int8: clipfast has no int8 layers
--train-data SHARDS --use-bnb-linear SwitchBackLinearGlobal

naflex
--train-data SHARDS --model naflex_ViT-B-16 --use-naflex --force-naflex-vision --naflex-seq-lens 128
--aug-cfg naflex=True

naflex converted: --force-naflex-vision: clipfast does not convert the image tower of ViT-B-16
--train-data SHARDS --model ViT-B-16 --use-naflex --force-naflex-vision

naflex accumulated: --accum-freq 4 with --use-naflex
--train-data SHARDS --model naflex_ViT-B-16 --use-naflex --accum-freq 4

captioner: it is for GenLIP
--train-data SHARDS --model naflex_ViT-B-16 --use-naflex --naflex-max-text-tokens 64

compiled
--train-data SHARDS --torchcompile --torchcompile-strategy task --torchcompile-backend eager

remote
--train-data SHARDS --logs ./scratch --remote-sync REMOTE --remote-sync-protocol fsspec --delete-previous-checkpoint

i50 t16 pretrain: unknown model 'ViT-B-16-CL16'
CLIPA --lr 2.048e-3 --warmup 782 --batch-size 8192 --aug-cfg scale='(0.4, 1.0)' --epochs 6
--model ViT-B-16-CL16 --ddp-static-graph --force-image-size 112 --log-every-n-steps 32

i17 t16 finetune: unknown model 'ViT-L-16-CL16-GAP'
CLIPA --lr 2.24e-5 --warmup 3571 --batch-size 896 --aug-cfg JITTER --epochs 1 --train-num-samples 131072000
--model ViT-L-16-CL16-GAP --pretrained WEIGHTS --ddp-static-graph --log-every-n-steps 293

i257 t32 finetune: unknown model 'ViT-H-14-CL32-GAP'
CLIPA --lr 5.12e-5 --warmup 800 --batch-size 4096 --aug-cfg JITTER --epochs 4 --train-num-samples 131072000
--model ViT-H-14-CL32-GAP --pretrained WEIGHTS --ddp-static-graph --force-image-size 224
--force-patch-dropout 0.3 --log-every-n-steps 64

i50 t8 pretrain, with an error of its own: invalid int value: '4e8'
CLIPA --lr 2.048e-3 --warmup 3200 --batch-size 8192 --aug-cfg JITTER --epochs 32 --train-num-samples 4e8
--model ViT-H-14-CL8-Syntax-GAP --ddp-static-graph --force-image-size 84 --log-every-n-steps 32

h14 pretrain: unknown model 'ViT-H-14-CL8-SyntaxMask-GAP'
CLIPA --lr 2.048e-3 --warmup 782 --batch-size 4096 --aug-cfg JITTER --epochs=7
--model ViT-H-14-CL8-SyntaxMask-GAP --force-image-size 84 --log-every-n-steps 32 --name name
--report-to wandb --wandb-project-name project_name

laion-5b
--save-frequency 1 --train-data=SHARDS --train-num-samples 135646078
--dataset-type webdataset --dataset-resampled --warmup 2000 --batch-size=375 --epochs=97 --lr 1e-3
--workers=8 --report-to wandb --name test-B-32-laion5b-lr1e-3-bs90k --logs ./scratch --model ViT-B-32
--seed 0 --ddp-static-graph --local-loss --gather-with-grad --grad-checkpointing --precision amp_bfloat16
--wandb-project-name open_clip6 --resume latest --remote-sync REMOTE

l16 evaluate: unknown model 'ViT-L-16-CL32-GAP'
--model ViT-L-16-CL32-GAP --pretrained WEIGHTS --seed 0 --imagenet-val IMAGENET

synthetic
SYNTHETIC --model RN50

synthetic unlocked
SYNTHETIC --model ViT-B-32 --lock-image --lock-image-unlocked-groups 5 --accum-freq 2

synthetic coca: unknown model 'coca_ViT-B-32'
SYNTHETIC --model coca_ViT-B-32

synthetic mt5: unknown model 'mt5-base-ViT-B-32'
SYNTHETIC --model mt5-base-ViT-B-32 --lock-text --lock-text-unlocked-layers 2
"""
SHARED = {
    "CLIPA": "--save-frequency 1 --save-most-recent --zeroshot-frequency 1 --train-data SHARDS "
    "--dataset-type webdataset --beta1 0.9 --beta2 0.95 --wd 0.2 --workers 6 --precision amp_bf16 --local-loss "
    "--gather-with-grad --grad-checkpointing --seed 0 --logs ./logs/ --imagenet-val IMAGENET",
    "JITTER": "scale='(0.4, 1.0)' color_jitter='(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8 gray_scale_prob=0.2",
    "SYNTHETIC": "--save-frequency 1 --zeroshot-frequency 1 --dataset-type synthetic --train-num-samples 16 "
    "--warmup 1 --batch-size 4 --lr 1e-3 --wd 0.1 --epochs 1 --workers 2",
}
WORDS, ERRORS = {}, {}  # words and errors of the commands by name
for paragraph in DOCUMENTED.strip().split("\n\n"):
    title, typed = paragraph.split("\n", 1)
    name, _, ERRORS[name] = title.partition(": ")
    typed = re.sub("|".join(SHARED), lambda found: SHARED[found[0]], typed)
    WORDS[name] = [
        part for word in shlex.split(typed) for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
VALID = [name for name, error in ERRORS.items() if not error]
# The commands that are run, because each of them tests something else; the last one is run with another model.
RUNS = ("resume", "laion-5b", "synthetic unlocked", "i257 t32 finetune")
# Values of flags for two very short steps; the size of these models does not matter.
NEEDED = {
    "--model": TINY, "--batch-size": "8", "--epochs": "1", "--train-num-samples": "16", "--warmup": "1",
    "--workers": "0",
}  # fmt: skip
SMALLER = NEEDED | {
    "--lock-image-unlocked-groups": "1", "--lock-text-unlocked-layers": "1", "--report-to": "tensorboard",
    "--distill-model": TINY, "--distill-pretrained": "WEIGHTS", "--force-image-size": "48",
}  # fmt: skip


def located(words, places):
    """Replace the paths in the words of a training command by small data."""
    return [re.sub("|".join(places), lambda found: places[found[0]], word) for word in words]


def smaller(words, places):
    """Change the words of a training command to two steps of a small model, or to two further steps."""
    found = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if "CHECKPOINT" in words:
        return located([*found, "--epochs", "2"], places)
    found += [part for flag, value in NEEDED.items() if flag not in words for part in (flag, value)]
    if "--accum-freq" in found:
        found += ["--train-num-samples", str(16 * passes_of(words))]
    return located(found, places)


def passes_of(words):
    """Return the passes of a training step."""
    return int(words[words.index("--accum-freq") + 1]) if "--accum-freq" in words else 1


def as_task(rank, words):
    """Run ``clipfast train`` as one of two processes that srun started, and return the exit code."""
    os.environ.update(
        {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2",
         "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    )  # fmt: skip
    return main(["train", *words])


@pytest.mark.usefixtures("one_prompt")
class TestCommands:
    @pytest.fixture
    def run(self, capsys, tmp_path, monkeypatch):
        """Return a function that runs ``clipfast train`` in a folder, and returns exit code, output and errors."""
        monkeypatch.chdir(tmp_path)
        return lambda *words: run_command(capsys, "train", *words)

    @pytest.mark.parametrize("name", VALID)
    def test_a_command_has_all_of_its_options(self, name, places, run):
        words = WORDS[name]
        code, out, err = run(*located(words, places), "--print-config")
        assert code == 0, err
        shown = rows(out)
        for flag, value in itertools.pairwise(located(words, places)):
            if flag in shown and not value.startswith("--"):
                expected = str(passes_of(words) * int(value)) if flag == "--batch-size" else value
                assert numbers(shown[flag][0]) == numbers(expected), flag

    @pytest.mark.parametrize("name", RUNS)
    def test_a_command_runs(self, name, places, run):
        words, passes = WORDS[name], passes_of(WORDS[name])
        is_training = "--train-data" in words or "synthetic" in words
        is_new = is_training and not {"--resume", "--name"} & set(words)
        code, out, err = run(*smaller(words, places), *["--name", "run"] * is_new)
        assert code == 0, err
        results = json.loads(out[out.index("{") :].split("\n}\n")[0] + "\n}")
        if is_training:
            epochs = 2 if "CHECKPOINT" in words else 1
            assert (results["steps"], results["samples_seen"]) == (2 * epochs, 16 * passes * epochs)
            assert 0 < results["train_loss"] < 10

    @pytest.mark.parametrize("name", [name for name in WORDS if ERRORS[name]])
    def test_a_command_that_does_not_run_says_why(self, name, places, run, tmp_path):
        words = ["tensorboard" if word == "wandb" else word for word in WORDS[name]]  # wandb may be missing
        code, _, err = run(*located(words, places))
        assert code == 2
        assert ERRORS[name] in err
        assert not list(tmp_path.glob("*/*/checkpoints"))

    @pytest.mark.long
    def test_processes_of_srun(self, places, tmp_path):
        words = [*smaller(WORDS["slurm"], places), "--device", "cpu", "--logs", str(tmp_path), "--name", "run"]
        (tmp_path / "ranks").mkdir()
        assert run_ranks(as_task, 2, words, folder=tmp_path / "ranks", timeout=300.0) == [0, 0]
        assert json.loads((tmp_path / "run" / "results.json").read_text())["samples_seen"] == 16
        assert "8 on each of 2 processes" in (tmp_path / "run" / "out.log").read_text()

    def test_without_training_data_it_evaluates(self, places, shards, run, tmp_path):
        torch.save({"epoch": 1, "name": "theirs", "state_dict": torch.load(places["WEIGHTS"])}, tmp_path / "epoch_1.pt")
        words = ["--val-data", shards, "--model", TINY]
        code, out, err = run(
            *words, "--imagenet-val", places["IMAGENET"], "--workers", "4", "--pretrained", places["WEIGHTS"]
        )
        assert code == 0, err
        pairs, imagenet = (json.loads("{" + text) for text in ("\n" + out).split("\n{")[1:])
        assert (pairs["images"], set(pairs["retrieval"])) == (48, {"text_to_image", "image_to_text"})
        assert imagenet["classes"] == 1000
        code, out, err = run(*words, "--resume", tmp_path / "epoch_1.pt")
        assert code == 0, err
        assert json.loads(out)["retrieval"] == pairs["retrieval"]
        code, _, err = run("--val-data", shards, "--force-image-size", "48")
        assert code == 2
        assert "--force-image-size" in err
