"""Training commands from OpenCLIP's documentation: their options, two short steps of some, and errors of the others."""

import itertools
import json
import os
import re
import shlex

import pytest
import torch

from clipfast.cli.main import main
from clipfast.train import TrainConfig
from clipfast.train.build import bare_model

from ..processes import run_ranks
from ..small_runs import COLOURS, TINY, picture, run_command
from .test_open_clip_flags import numbers
from .test_recipes import rows

# Commands of OpenCLIP's README, its docs/script_examples and its tests. Above each command stand its name and, if
# clipfast refuses the command, the error. Paths are replaced by small data.
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
WORDS, ERRORS = {}, {}  # the words of each command, and its expected error or "", by the command's name
for paragraph in DOCUMENTED.strip().split("\n\n"):
    title, typed = paragraph.split("\n", 1)
    name, _, ERRORS[name] = title.partition(": ")
    typed = re.sub("|".join(SHARED), lambda found: SHARED[found[0]], typed)
    WORDS[name] = [
        part for word in shlex.split(typed) for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
VALID = [name for name, error in ERRORS.items() if not error]
# The commands that are run, each for other options. The last one's model is unknown, so it is run with another model.
RUNS = ("resume", "laion-5b", "synthetic unlocked", "i257 t32 finetune")
# Values of flags by which a command takes two very short steps of a tiny model.
NEEDED = {
    "--model": TINY, "--batch-size": "8", "--epochs": "1", "--train-num-samples": "16", "--warmup": "1",
    "--workers": "0",
}  # fmt: skip
SMALLER = NEEDED | {
    "--lock-image-unlocked-groups": "1", "--lock-text-unlocked-layers": "1", "--report-to": "tensorboard",
    "--distill-model": TINY, "--distill-pretrained": "WEIGHTS", "--force-image-size": "48",
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, shards, imagenet):
    """Make small data for each path in a command of OpenCLIP's trainer."""
    folder = tmp_path_factory.mktemp("data")
    pairs = ["filepath\ttitle"]
    for index in range(24):
        (folder / f"{index}.png").write_bytes(picture(index))
        pairs.append(f"{folder}/{index}.png\ta {COLOURS[index % 8]} thing {index}")
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    model = bare_model(TrainConfig("x.tar", model=TINY), {}, torch.device("cpu"))
    torch.save(model.state_dict(), folder / "weights.pt")
    run = "--train-num-samples 16 --batch-size 8 --epochs 1 --warmup 1 --workers 0 --name before --model"
    run = f"train --train-data {folder}/pairs.csv --logs {folder} {run} {TINY}"
    assert main(run.split()) == 0
    return {
        "SHARDS": shards.partition("::")[0], "TABLE": f"{folder}/pairs.csv", "IMAGENET": imagenet,
        "WEIGHTS": f"{folder}/weights.pt", "CHECKPOINT": f"{folder}/before/checkpoints/epoch_latest.pt",
        "REMOTE": f"file://{folder}/remote",
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
    """Return the number of passes (--accum-freq) in a training step of this command."""
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
        words = ["tensorboard" if word == "wandb" else word for word in WORDS[name]]  # the package wandb may be missing
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
