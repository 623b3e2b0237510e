"""What the options with OpenCLIP's names do: each of them changes what it says."""

import contextlib
import dataclasses
import io
import json
import logging
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.checkpoint import read_checkpoint
from clipfast.data import ANY_ORDER
from clipfast.evaluation import imagenet as imagenet_module
from clipfast.evaluation import zero_shot
from clipfast.evaluation.imagenet import imagenet_set
from clipfast.images import ImageError
from clipfast.models import CLIP
from clipfast.ranks import run_ranks
from clipfast.training.build import bare_model, build_model, build_tokenizer
from clipfast.training.data import pair_batches, sources_of
from clipfast.training.distillation import Distillation
from clipfast.training.logs import log, logging_to
from clipfast.training.loop import train
from clipfast.training.preflight import preflight
from clipfast.training.run import RunFolder
from clipfast.training.world import ALONE, World, _places

from . import test_training
from .conftest import picture, run_command
from .distributed import empty, on_rank, trained
from .test_training import losses, saved_step

CPU = torch.device("cpu")


def config(shards, tmp_path, **options):
    """Four steps an epoch, without data workers."""
    return test_training.config(shards, tmp_path, **{"workers": 0, "epochs": 1} | options)


class TestModel:
    @pytest.mark.parametrize("side", [(48,), (48, 48)])
    def test_sizes_and_activation(self, side, shards, tmp_path):
        forced = {"force_image_size": side, "force_context_length": 16, "force_quick_gelu": True}
        model = bare_model(config(shards, tmp_path, **forced), {}, CPU)
        assert (model.visual.image_size, model.context_length, model.config.quick_gelu) == (48, 16, True)

    def test_a_run_goes_on_with_the_sizes_that_it_began_with(self, shards, tmp_path):
        forced = {"force_image_size": (48,), "force_context_length": 16}
        run, _ = train(config(shards, tmp_path, epochs=1, **forced))
        again, _ = train(config(shards, tmp_path, epochs=2, **forced), run.latest)
        assert saved_step(again.path) == 8
        with pytest.raises(ValueError, match=r"those of its own model: --force-image-size \[48\] -> \[32\]"):
            train(config(shards, tmp_path, epochs=3, **forced | {"force_image_size": (32,)}), run.latest)

    def test_preprocessing(self, shards, tmp_path):
        given = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5,), "image_interpolation": "bilinear"}
        options = config(shards, tmp_path, **given, image_resize_mode="squash")
        for saved in ({}, {"model_config": bare_model(options, {}, CPU).config.to_dict(), "preprocess_cfg": {}}):
            visual = bare_model(options, saved, CPU).visual
            assert visual.image_mean == (0.1, 0.2, 0.3)
            assert tuple(visual.image_std) == (0.5, 0.5, 0.5)
            assert visual.preprocess_cfg["interpolation"] == "bilinear"
            assert visual.resize_mode == "squash"

    def test_the_cache_is_given_to_who_downloads(self, shards, tmp_path):
        created = mock.patch("clipfast.training.build.create_model", side_effect=StopIteration)
        with created as create, pytest.raises(StopIteration):
            bare_model(config(shards, tmp_path, cache_dir="there"), {}, CPU)
        assert create.call_args.kwargs["cache_dir"] == "there"

    def test_weights_in_bfloat16_with_norms_in_float32(self, shards, tmp_path):
        options = config(shards, tmp_path, precision="bf16", epochs=2)
        run, _ = train(options)
        model = bare_model(options, {}, CPU)
        assert model.text_projection.dtype == torch.bfloat16
        assert model.ln_final.weight.dtype == model.logit_scale.dtype == torch.float32
        assert losses(run)[-1] < losses(run)[0]
        train(config(shards, tmp_path, precision="bf16", epochs=3), run.latest)
        assert read_checkpoint(run.latest)["state_dict"]["text_projection"].dtype == torch.bfloat16

    def test_autocast_by_its_longer_name(self, shards, tmp_path):
        short, long = (
            train(config(shards, tmp_path / name, precision=name))[0] for name in ("amp_bf16", "amp_bfloat16")
        )
        assert losses(short) == losses(long)
        assert losses(short) != losses(train(config(shards, tmp_path / "fp32"))[0])

    def test_backend_and_mode_of_the_compiler(self, shards, tmp_path):
        options = config(shards, tmp_path, torchcompile=True, torchcompile_backend="eager", torchcompile_mode="default")
        with mock.patch.object(CLIP, "compile") as compiled:
            build_model(options, {}, CPU)
        assert compiled.call_args.kwargs == {"fullgraph": True, "backend": "eager", "mode": "default"}

    def test_an_optimizer_of_timm(self, shards, tmp_path):
        pytest.importorskip("timm")
        by_name, by_path = (
            train(config(shards, tmp_path / str(number), opt=name))[0]
            for number, name in enumerate(("timm/lamb", "timm.optim:Lamb"))
        )
        assert losses(by_name) == losses(by_path)
        with pytest.raises(ValueError, match=r"--opt timm/lambda: timm knows .*lamb"):
            train(config(shards, tmp_path / "2", opt="timm/lambda"))


def batches_of(options):
    """The batches of a run with these options, without data workers."""
    model = bare_model(options, {}, CPU)
    sources = sources_of(options, options.train_data.split("::"))
    return pair_batches(options, sources, ANY_ORDER, model, build_tokenizer(options, model), 8)


class TestData:
    @pytest.mark.parametrize("whole", [{}, {"crop_scale": (1.0, 1.0)}, {"decode_on_device": True}])
    def test_larger_images_are_left_out(self, whole, shards, tmp_path):
        photograph = io.BytesIO()
        Image.open(io.BytesIO(picture(0))).save(photograph, "JPEG")
        for image in (picture(0), photograph.getvalue()):
            for pixels in (0, 24 * 24):
                batches_of(config(shards, tmp_path, max_image_pixels=pixels, **whole)).transform(image)
            with pytest.raises(ImageError, match="24x24 pixels, more than the limit of 575"):
                batches_of(config(shards, tmp_path, max_image_pixels=575, **whole)).transform(image)
        with pytest.raises(ValueError, match="not one of 4 pairs that were tried can be used"):
            preflight(config(shards, tmp_path, max_image_pixels=575, **whole), RunFolder(tmp_path / "x"), {})

    def test_crops_and_colours_of_aug_cfg(self, shards, tmp_path):
        plain = batches_of(config(shards, tmp_path)).transform
        words = ("scale=(0.1,0.2)", "ratio=(0.5,0.6)", "gray_scale_prob=1.0")
        crops = batches_of(config(shards, tmp_path, aug_cfg=words)).transform
        torch.manual_seed(0)
        for _ in range(20):
            left, top, right, bottom = crops.box(1000, 1000)
            assert 0.09 < (right - left) * (bottom - top) / 1e6 < 0.21
            assert 0.49 < (right - left) / (bottom - top) < 0.61
        grey, coloured = crops(picture(1)), plain(picture(1))
        assert torch.equal(grey[0], grey[1])
        assert not torch.equal(coloured[0], coloured[1])

    def test_what_aug_cfg_leaves_to_timm_is_refused_before_training(self, shards, tmp_path):
        with pytest.raises(ValueError, match=r"aug_cfg has re_prob=0\.1, which OpenCLIP leaves to timm"):
            preflight(config(shards, tmp_path, aug_cfg=("re_prob=0.1",)), RunFolder(tmp_path / "x"), {})


class TestProcesses:
    def test_the_first_gpu_that_a_process_sees(self):
        world = World(1, 2, 1, 2)
        with (
            mock.patch("clipfast.training.world.resolve_device", return_value="cuda"),
            mock.patch("torch.cuda.device_count", return_value=1),
        ):
            assert world.device("cuda", by_rank=False) == torch.device("cuda", 0)
            with pytest.raises(ValueError, match="--no-set-device-rank if each process sees only its own"):
                world.device("cuda")

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
        with pytest.raises(ValueError, match="srun started 11 processes, and MASTER_ADDR is not set"):
            _places({key: value for key, value in slurm.items() if key != "MASTER_ADDR"})

    def test_one_process_alone(self):
        assert _places({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1, 0, 1)  # of a batch script, without srun
        assert _places({"SLURM_STEP_NUM_TASKS": "1"}) == (0, 1, 0, 1)

    @pytest.mark.parametrize(("rank", "local_rank", "name"), [(0, 0, "out-0"), (2, 0, "out-2"), (3, 1, None)])
    def test_a_log_for_each_machine(self, rank, local_rank, name, tmp_path):
        folder = tmp_path / "run"
        with logging_to(RunFolder(folder), World(rank, 4, local_rank, 2), by_machine=True):
            log.warning("something")
        assert [path.name for path in folder.glob("*")] == [name] * (name is not None)
        if name is not None:
            assert "something" in (folder / name).read_text()
        assert not any(isinstance(handler, logging.FileHandler) for handler in log.handlers)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder like ImageNet's, whose images are all alike."""
    folder = tmp_path_factory.mktemp("imagenet")
    image = picture(0)
    for number in range(1000):
        (folder / f"n{number:08d}").mkdir()
        (folder / f"n{number:08d}" / "1.png").write_bytes(image)
    return folder


class TestEvaluation:
    @pytest.fixture(autouse=True)
    def one_prompt(self, monkeypatch):
        """One prompt in place of 80, and words that a small model tells apart in no time."""
        monkeypatch.setattr(imagenet_module, "OPENAI_IMAGENET_TEMPLATES", ("{}",))

    def test_imagenet_in_training(self, classes, shards, tmp_path):
        run, _ = train(config(shards, tmp_path, epochs=3, imagenet_val=str(classes), zeroshot_frequency=2))
        lines = [line for line in run.metrics() if "imagenet" in line]
        assert [line["step"] for line in lines] == [8, 12]  # after the second epoch, and after the last one
        # All images are equal, so that one class is the best for all of them, and five are among the best.
        assert lines[-1]["imagenet"] == {"imagenet-zeroshot-val-top1": 0.001, "imagenet-zeroshot-val-top5": 0.005}
        results = json.loads((run.path / "results.json").read_text())
        assert results["imagenet-zeroshot-val-top1"] == 0.001
        line = "Eval Epoch: 3 imagenet-zeroshot-val-top1: 0.0010\timagenet-zeroshot-val-top5: 0.0050\tafter step 12"
        assert line in (run.path / "out.log").read_text()

    def test_imagenet_never(self, classes, shards, tmp_path):
        run, _ = train(config(shards, tmp_path, epochs=1, imagenet_val=str(classes), zeroshot_frequency=0))
        assert not any("imagenet" in line for line in run.metrics())

    def test_classes_of_v2_are_numbers(self, tmp_path):
        for number in range(1000):
            (tmp_path / "ImageNetV2-matched-frequency" / str(number)).mkdir(parents=True)
        found = imagenet_set(str(tmp_path))
        assert found.data.endswith("ImageNetV2-matched-frequency")
        assert imagenet_module._classes(tmp_path / "ImageNetV2-matched-frequency")[:3] == ["0", "1", "2"]

    def test_what_is_not_imagenet_is_refused_before_training(self, shards, tmp_path):
        (tmp_path / "few" / "cat").mkdir(parents=True)
        for flag, folder, message in (
            ("imagenet_val", tmp_path / "few", "--imagenet-val: .*few has 1 sub-folders: ImageNet has one sub-folder"),
            ("imagenet_v2", tmp_path / "none", "--imagenet-v2: .*none is no folder"),
        ):
            with pytest.raises(ValueError, match=message):
                preflight(config(shards, tmp_path, **{flag: str(folder)}), RunFolder(tmp_path / "x"), {})

    @pytest.mark.parametrize(("frequency", "steps"), [(1, [4, 8, 12]), (2, [8, 12]), (5, [12]), (0, [])])
    def test_how_often(self, frequency, steps, shards, tmp_path):
        run, _ = train(config(shards, tmp_path, epochs=3, val_data=shards, val_frequency=frequency))
        assert [line["step"] for line in run.metrics() if "eval" in line] == steps


class TestDistillation:
    @pytest.fixture
    def teacher(self, tmp_path, shards):
        """Options of a run with a teacher of the same shape and other weights."""
        torch.manual_seed(7)
        model = bare_model(config(shards, tmp_path), {}, CPU)
        torch.save(model.state_dict(), tmp_path / "teacher.pt")
        return {"distill_model": config(shards, tmp_path).model, "distill_pretrained": str(tmp_path / "teacher.pt")}

    def test_the_loss_is_that_of_the_pairs_and_of_the_teacher(self, teacher, shards, tmp_path):
        options = config(shards, tmp_path, **teacher)
        student = bare_model(options, {}, CPU)
        distillation = Distillation(options, student, CPU, autocast=contextlib.nullcontext)
        images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
        texts = build_tokenizer(options, student)([f"thing {number}" for number in range(8)])
        distillation.look(images, texts, 3)
        outputs = student(images, texts)
        image, text, scale = (output.double() for output in outputs)
        dense = scale * image @ text.T
        with torch.no_grad():
            image, text, scale = (output.double() for output in distillation.teacher(images, texts))
        target, right = scale * image @ text.T, torch.arange(8)
        both = [(dense, target), (dense.T, target.T)]
        expected = (
            sum(F.cross_entropy(ours, right) + F.cross_entropy(ours, theirs.softmax(1)) for ours, theirs in both) / 2
        )
        assert distillation(*outputs).item() == pytest.approx(expected.item(), rel=1e-5)
        assert not any(parameter.requires_grad for parameter in distillation.teacher.parameters())

    def test_a_run_with_a_teacher(self, teacher, shards, tmp_path):
        runs = {
            "plain": {}, "distilled": teacher, "in parts": teacher | {"micro_batch_size": 3},
        }  # fmt: skip
        found = {name: losses(train(config(shards, tmp_path / name, **given))[0]) for name, given in runs.items()}
        assert found["distilled"] == pytest.approx(found["in parts"], rel=1e-5)
        # The logits of the teacher say next to nothing, so that their cross-entropy is that of a guess among 8 pairs.
        assert found["distilled"][0] - found["plain"][0] == pytest.approx(math.log(8), abs=0.5)

    @pytest.mark.long
    def test_two_ranks_do_what_one_does(self, teacher, shards, tmp_path):
        options = {"global_batch_size": 8, "unique_by": None, "log_every_n_steps": 1}
        given = [dataclasses.asdict(config(shards, tmp_path / name, **teacher, **options)) for name in ("one", "two")]
        assert trained(ALONE, given[0]) is None
        assert run_ranks(on_rank, 2, 2, [(given[1],)], folder=empty(tmp_path)) == [[None], [None]]
        one, two = (losses(RunFolder(tmp_path / name / "run")) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"distill_pretrained": None}, "--distill-model and --distill-pretrained go together"),
            ({"distill_model": None}, "--distill-model and --distill-pretrained go together"),
            ({"distill_model": "ViT-B-32"}, "--distill-model ViT-B-32 has images of 224, and .* of 32: a teacher"),
            ({"force_context_length": 8}, "has texts of 16, and .* of 8"),
            ({"distill_model": "ViT-X"}, "unknown model 'ViT-X'"),
            ({"cuda_graphs": True}, "--distill-model cannot be used with --cuda-graphs"),
        ],
    )
    def test_what_cannot_work(self, changes, message, teacher, shards, tmp_path):
        with pytest.raises(ValueError, match=message):
            preflight(config(shards, tmp_path, **teacher | changes), RunFolder(tmp_path / "x"), {})


class TestRunFolder:
    @pytest.mark.parametrize(
        ("options", "kept"),
        [
            ({"save_frequency": 2}, {"epoch_2.pt", "epoch_3.pt"}),
            ({"save_frequency": 0}, set()),
            ({"save_frequency": 1, "delete_previous_checkpoint": True}, {"epoch_3.pt"}),
        ],
    )
    def test_epochs_that_are_kept(self, options, kept, shards, tmp_path):
        run, _ = train(config(shards, tmp_path, epochs=3, **options))
        names = {path.name for path in run.checkpoints.glob("epoch_*.pt")}
        assert names - {"epoch_latest.pt"} == kept
        assert run.latest.exists()

    def test_more_metrics_than_lines_in_the_log(self, shards, tmp_path):
        run, _ = train(config(shards, tmp_path, epochs=2, log_every_n_steps=3, log_metric_every_n_steps=1))
        assert [line["step"] for line in run.metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert (run.path / "out.log").read_text().count("Train Epoch:") == 4  # steps 3, 4, 6 and 8


def test_resume_latest_begins_a_run(shards, tmp_path, capsys):
    words = ["--logs", tmp_path, "--name", "run", "--resume", "latest", "--train-num-samples", "16", "--workers", "0"]
    words += ["--model", config(shards, tmp_path).model, "--batch-size", "8", "--warmup", "1", "--train-data", shards]
    code, _, err = run_command(capsys, "train", *words, "--epochs", "1")
    assert code == 0, err
    assert saved_step(tmp_path / "run") == 2
    assert run_command(capsys, "train", *words, "--epochs", "2")[0] == 0
    assert saved_step(tmp_path / "run") == 4
    assert "Resuming from" in (tmp_path / "run" / "out.log").read_text()


class TestWithoutTrainingData:
    def test_a_command_that_evaluates(self, classes, shards, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(zero_shot, "TEMPLATES", zero_shot.TEMPLATES | {"openai": ("{}",)})
        model = config(shards, tmp_path).model
        torch.save(bare_model(config(shards, tmp_path), {}, CPU).state_dict(), tmp_path / "weights.pt")
        words = ["--val-data", shards, "--imagenet-val", classes, "--model", model, "--workers", "4"]
        code, out, err = run_command(capsys, "train", *words, "--pretrained", tmp_path / "weights.pt")
        assert code == 0, err
        pairs, imagenet = (json.loads("{" + text) for text in ("\n" + out).split("\n{")[1:])
        assert pairs["images"] == 48
        assert set(pairs["retrieval"]) == {"text_to_image", "image_to_text"}
        assert imagenet["classes"] == 1000

    def test_a_checkpoint_of_openclip_to_resume_is_what_is_evaluated(self, shards, tmp_path, capsys):
        model = config(shards, tmp_path).model
        state = bare_model(config(shards, tmp_path), {}, CPU).state_dict()
        torch.save({"epoch": 1, "name": "theirs", "state_dict": state}, tmp_path / "epoch_1.pt")
        words = ["--val-data", shards, "--model", model]
        code, out, err = run_command(capsys, "train", *words, "--resume", tmp_path / "epoch_1.pt")
        assert code == 0, err
        assert json.loads(out)["images"] == 48

    def test_what_an_evaluation_does_not_know_is_refused(self, shards, capsys):
        code, _, err = run_command(capsys, "train", "--val-data", shards, "--force-image-size", "48")
        assert code == 2
        assert "clipfast eval does not have --force-image-size" in err
