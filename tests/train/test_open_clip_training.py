"""Training options that OpenCLIP has too, and their effects: sizes, crops, processes, evaluation, distillation."""

import contextlib
import dataclasses
import io
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipfast.checkpoints.checkpoint import read_checkpoint
from clipfast.data import ANY_ORDER
from clipfast.distributed.world import World, _places
from clipfast.evaluate.imagenet import imagenet_set
from clipfast.models.images import ImageError
from clipfast.runs.folder import RunFolder
from clipfast.train.build import Distillation, bare_model, build_tokenizer
from clipfast.train.data import pair_batches, sources_of
from clipfast.train.logs import log, logging_to
from clipfast.train.loop import train
from clipfast.train.optim import make_optimizer
from clipfast.train.preflight import preflight

from ..small_runs import TINY, cases, picture
from . import test_training
from .test_training import losses, saved_step

CPU = torch.device("cpu")


@pytest.fixture
def config(shards, tmp_path):
    """Return a function that returns training options of four steps an epoch, without data workers."""

    def make(name="run", **options):
        """Return the options of a small training run, changed by ``options``."""
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
        # The variables of a Slurm batch script that starts Python without srun.
        assert _places({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == (0, 1, 0, 1)
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
    def test_how_often_a_run_evaluates_logs_and_saves(self, imagenet, shards, config):
        often = {"zeroshot_frequency": 2, "val_frequency": 5, "log_every_n_steps": 3, "log_metric_every_n_steps": 1}
        given = {"imagenet_val": imagenet, "val_data": shards, "save_frequency": 2}
        run, _ = train(config(epochs=3, **given, **often))
        lines = [line for line in run.metrics() if "imagenet" in line]
        assert [line["step"] for line in lines] == [8, 12]  # evaluations follow the second epoch and the last one
        assert [line["step"] for line in run.metrics() if "eval" in line] == [12]
        # All images are equal, so one class is the best for all of them, and five classes are in the top five.
        expected = {"imagenet-zeroshot-val-top1": 0.001, "imagenet-zeroshot-val-top5": 0.005}
        assert lines[-1]["imagenet"] == expected
        assert expected.items() <= json.loads((run.path / "results.json").read_text()).items()
        log = (run.path / "out.log").read_text()
        assert re.search("Eval Epoch: 3 .*imagenet-zeroshot-val-top1: 0.0010\t", log)
        assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, 13))
        assert log.count("Train Epoch:") == 6  # the log has lines for steps 3, 4, 6, 8, 9 and 12
        assert {path.name for path in run.checkpoints.glob("epoch_*")} == {
            "epoch_2.pt",
            "epoch_3.pt",
            "epoch_latest.pt",
        }

    def test_a_run_that_neither_evaluates_nor_keeps_epochs(self, imagenet, shards, config):
        never = {"zeroshot_frequency": 0, "val_frequency": 0, "save_frequency": 1}
        run, _ = train(
            config(imagenet_val=imagenet, val_data=shards, epochs=2, delete_previous_checkpoint=True, **never)
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
        # The contrastive loss begins near log(8), the loss of guessing among 8 pairs. The distillation loss does, too,
        # since the teacher's logits are almost uniform.
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
