"""Training commands from OpenCLIP's documentation: each runs as it is, or says why not.

The arguments are OpenCLIP's. Paths stand for small data, and models for a small one, as :func:`replaced` says.
"""

import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest
import torch

from clipfast.cli import main
from clipfast.evaluation import zero_shot
from clipfast.training import TrainConfig
from clipfast.training.build import bare_model

from .conftest import COLOURS, TINY, picture, run_command, sample, write_shard
from .test_recipes import rows

CLIPA = (
    "--save-frequency 1 --save-most-recent --zeroshot-frequency 1 --train-data SHARDS --dataset-type webdataset "
    "--beta1 0.9 --beta2 0.95 --wd 0.2 --workers 6 --precision amp_bf16 --local-loss --gather-with-grad "
    "--grad-checkpointing --seed 0 --logs ./logs/ --imagenet-val IMAGENET "
)
JITTER = "color_jitter='(0.32, 0.32, 0.32, 0.08)' color_jitter_prob=0.8 gray_scale_prob=0.2"
CC12M = (
    "--train-data SHARDS --train-num-samples 10968539 --dataset-type webdataset --batch-size 320 --precision amp "
    "--workers 4 --imagenet-val IMAGENET"
)
SYNTHETIC = (
    "--save-frequency 1 --zeroshot-frequency 1 --dataset-type synthetic --train-num-samples 16 --warmup 1 "
    "--batch-size 4 --lr 1e-3 --wd 0.1 --epochs 1 --workers 2 "
)
CLAP = "--model CLAP-HTSAT-tiny-Roberta-base-fused --pretrained laion --audio-zeroshot-split train --device cuda "
README = "README.md"
EXAMPLES = "docs/script_examples"
# Where a command is documented, its arguments, and the error of those that are refused.
COMMANDS = {
    "sample": (
        README, "--save-frequency 1 --zeroshot-frequency 1 --report-to tensorboard --train-data=TABLE --val-data=TABLE "
        "--csv-img-key filepath --csv-caption-key title --imagenet-val=IMAGENET --warmup 10000 --batch-size=128 "
        "--lr=1e-3 --wd=0.1 --epochs=30 --workers=8 --model RN50", None,
    ),
    "one node": (README, CC12M, None),
    "several nodes": (README, CC12M, None),
    "slurm": (
        README, "--save-frequency 1 --report-to tensorboard --train-data=SHARDS --warmup 2000 --batch-size=256 "
        "--epochs=32 --workers=8 --model ViT-B-32 --name ViT-B-32-Vanilla --seed 0 --local-loss --gather-with-grad",
        None,
    ),
    "resume": (README, "--train-data=TABLE --val-data=TABLE --resume CHECKPOINT", None),
    "coca": (
        README, "--dataset-type csv --train-data TABLE --warmup 1000 --batch-size 128 --lr 1e-5 --wd 0.1 --epochs 1 "
        "--workers 3 --model coca_ViT-L-14 --report-to wandb --coca-contrastive-loss-weight 0 "
        "--coca-caption-loss-weight 1 --log-every-n-steps 100", "clipfast trains no captioner",
    ),
    "roberta": (
        README, "--train-data=SHARDS --train-num-samples 3000000 --val-data=SHARDS --val-num-samples 10000 "
        "--dataset-type webdataset --batch-size 256 --warmup 2000 --epochs 10 --lr 5e-4 --precision amp --workers 6 "
        "--model roberta-ViT-B-32 --lock-text --lock-text-unlocked-layers 10 --name 10_unfrozen "
        "--report-to tensorboard",
        "unknown model 'roberta-ViT-B-32'",
    ),
    "evaluate local": (README, "--val-data=TABLE --model RN101 --pretrained WEIGHTS", None),
    "evaluate hosted": (README, "--imagenet-val IMAGENET --model ViT-B-32-quickgelu --pretrained WEIGHTS", None),
    "esc-50": (
        README, CLAP + "--audio-zeroshot-dataset ashraq/esc50 --batch-size 64 --workers 4 --zeroshot-frequency 1",
        "use OpenCLIP for audio",
    ),
    "urban sound": (
        README, CLAP + "--audio-zeroshot-dataset mteb/urbansound8K --audio-zeroshot-target-key classID "
        "--audio-zeroshot-class-key class --batch-size 64 --workers 4", "use OpenCLIP for audio",
    ),
    "several sources": (README, "--train-data SHARDS::SHARDS --dataset-resampled", None),
    "weighted sources": (
        README, "--train-data SHARDS::SHARDS --dataset-resampled --train-data-upsampling-factors=0.001::0.01", None,
    ),
    "shorter epochs": (README, "--train-data SHARDS --train-num-samples 135646078 --dataset-resampled", None),
    "no patch dropout": (README, "--train-data SHARDS --model ViT-B-32 --force-patch-dropout 0.", None),
    "distillation": (README, "--train-data SHARDS --distill-model ViT-L-14 --distill-pretrained openai", None),
    "accumulation": (
        README, "--train-data SHARDS --batch-size 64 --accum-freq 4 --grad-checkpointing --local-loss "
        "--gather-with-grad", None,
    ),
    "int8": (
        README, "--train-data SHARDS --use-bnb-linear SwitchBackLinearGlobal", "clipfast has no int8 layers",
    ),
    "naflex": (README, "--train-data SHARDS --use-naflex --naflex-seq-lens 128 256", "clipfast's images all have one"),
    "compiled": (
        README, "--train-data SHARDS --torchcompile --torchcompile-strategy task --torchcompile-backend eager", None,
    ),
    "remote": (
        README, "--train-data SHARDS --logs ./scratch --remote-sync REMOTE --remote-sync-protocol fsspec "
        "--delete-previous-checkpoint", None,
    ),
    "i50 t16 pretrain": (
        f"{EXAMPLES}/clipa/vit_b16", CLIPA + "--lr 2.048e-3 --warmup 782 --batch-size 8192 --aug-cfg "
        "scale='(0.4, 1.0)' --epochs 6 --model ViT-B-16-CL16 --ddp-static-graph --force-image-size 112 "
        "--log-every-n-steps 32",
        "unknown model 'ViT-B-16-CL16'",
    ),
    "i50 t16 finetune": (
        f"{EXAMPLES}/clipa/vit_b16", CLIPA + "--lr 2.56e-5 --warmup 3072 --batch-size 1024 --aug-cfg "
        "scale='(0.4, 1.0)' --epochs 1 --train-num-samples 131072000 --model ViT-B-16-CL16 --pretrained WEIGHTS "
        "--ddp-static-graph --log-every-n-steps 256", "unknown model 'ViT-B-16-CL16'",
    ),
    "i17 t16 pretrain": (
        f"{EXAMPLES}/clipa/vit_l16", CLIPA + f"--lr 1.024e-3 --warmup 1563 --batch-size 4096 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs 6 --model ViT-L-16-CL16-GAP --ddp-static-graph --force-image-size 64 "
        "--log-every-n-steps 64", "unknown model 'ViT-L-16-CL16-GAP'",
    ),
    "i17 t16 finetune": (
        f"{EXAMPLES}/clipa/vit_l16", CLIPA + f"--lr 2.24e-5 --warmup 3571 --batch-size 896 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs 1 --train-num-samples 131072000 --model ViT-L-16-CL16-GAP "
        "--pretrained WEIGHTS --ddp-static-graph --log-every-n-steps 293", "unknown model 'ViT-L-16-CL16-GAP'",
    ),
    "i37 t8 pretrain": (
        f"{EXAMPLES}/clipa/vit_l16", CLIPA + f"--lr 1.024e-3 --warmup 1563 --batch-size 4096 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs 6 --model ViT-L-16-CL8-Syntax-GAP --ddp-static-graph "
        "--force-image-size 96 --log-every-n-steps 64", "unknown model 'ViT-L-16-CL8-Syntax-GAP'",
    ),
    "i257 t32 finetune": (
        f"{EXAMPLES}/clipav2/vit_h14", CLIPA + f"--lr 5.12e-5 --warmup 800 --batch-size 4096 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs 4 --train-num-samples 131072000 --model ViT-H-14-CL32-GAP --pretrained "
        "WEIGHTS --ddp-static-graph --force-image-size 224 --force-patch-dropout 0.3 --log-every-n-steps 64",
        "unknown model 'ViT-H-14-CL32-GAP'",
    ),
    "i50 t8 pretrain": (
        f"{EXAMPLES}/clipav2/vit_h14", CLIPA + f"--lr 2.048e-3 --warmup 3200 --batch-size 8192 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs 32 --train-num-samples 4e8 --model ViT-H-14-CL8-Syntax-GAP "
        "--ddp-static-graph --force-image-size 84 --log-every-n-steps 32",
        "invalid int value: '4e8'",  # there as well
    ),
    "laion-5b": (
        f"{EXAMPLES}/stability_example.sh", "--save-frequency 1 --train-data=SHARDS --train-num-samples 135646078 "
        "--dataset-type webdataset --dataset-resampled --warmup 2000 --batch-size=375 --epochs=97 --lr 1e-3 "
        "--workers=8 --report-to wandb --name test-B-32-laion5b-lr1e-3-bs90k --logs ./scratch --model ViT-B-32 "
        "--seed 0 --ddp-static-graph --local-loss --gather-with-grad --grad-checkpointing --precision amp_bfloat16 "
        "--wandb-project-name open_clip6 --resume latest --remote-sync REMOTE", None,
    ),
    "h14 pretrain": (
        "scripts/h14_84_8_pretrain.sh", CLIPA + f"--lr 2.048e-3 --warmup 782 --batch-size 4096 --aug-cfg "
        f"scale='(0.4, 1.0)' {JITTER} --epochs=7 --model ViT-H-14-CL8-SyntaxMask-GAP --force-image-size 84 "
        "--log-every-n-steps 32 --name name --report-to wandb --wandb-project-name project_name",
        "unknown model 'ViT-H-14-CL8-SyntaxMask-GAP'",
    ),
    "l16 evaluate": (
        "scripts/clipav1_vit_l16_i37_t8.sh", "--model ViT-L-16-CL32-GAP --pretrained WEIGHTS --seed 0 "
        "--imagenet-val IMAGENET", "unknown model 'ViT-L-16-CL32-GAP'",
    ),
    "synthetic": ("tests/test_training_simple.py", SYNTHETIC + "--model RN50", None),
    "synthetic unlocked": (
        "tests/test_training_simple.py", SYNTHETIC + "--model ViT-B-32 --lock-image --lock-image-unlocked-groups 5 "
        "--accum-freq 2", None,
    ),
    "synthetic coca": (
        "tests/test_training_simple.py", SYNTHETIC + "--model coca_ViT-B-32", "unknown model 'coca_ViT-B-32'",
    ),
    "synthetic mt5": (
        "tests/test_training_simple.py", SYNTHETIC + "--model mt5-base-ViT-B-32 --lock-text "
        "--lock-text-unlocked-layers 2", "unknown model 'mt5-base-ViT-B-32'",
    ),
}  # fmt: skip
RUNS = [name for name, (_, _, refused) in COMMANDS.items() if refused is None]
REFUSED = [name for name in COMMANDS if name not in RUNS]
# Values of flags for two steps in no time; of these models the size is no matter.
SMALLER = {
    "--model": TINY, "--batch-size": "8", "--epochs": "1", "--train-num-samples": "16", "--warmup": "1",
    "--workers": "0", "--lock-image-unlocked-groups": "1", "--report-to": "tensorboard", "--distill-model": TINY,
    "--distill-pretrained": "WEIGHTS", "--force-image-size": "48",
}  # fmt: skip


def words_of(name: str) -> list[str]:
    """The words of a command."""
    typed = shlex.split(COMMANDS[name][1])
    return [part for word in typed for part in (word.split("=", 1) if word.startswith("--") else [word])]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Small data in the place of each path."""
    folder = tmp_path_factory.mktemp("data")
    write_shard(folder / "00000.tar", [sample(index) for index in range(24)])
    write_shard(folder / "00001.tar", [sample(index, png=picture(100 + index)) for index in range(24)])
    rows = ["filepath\ttitle"]
    for index in range(24):
        (folder / f"{index}.png").write_bytes(picture(index))
        rows.append(f"{folder}/{index}.png\ta {COLOURS[index % 8]} thing {index}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    for number in range(1000):
        (folder / "val" / f"n{number:08d}").mkdir(parents=True)
        (folder / "val" / f"n{number:08d}" / "1.png").symlink_to(folder / f"{number % 24}.png")
    model = bare_model(TrainConfig("x.tar", model=TINY), {}, torch.device("cpu"))
    torch.save(model.state_dict(), folder / "weights.pt")
    run = "--model RN50 --train-num-samples 16 --batch-size 8 --epochs 1 --warmup 1 --workers 0 --name before"
    run = run.replace("RN50", TINY).split()
    assert main(["train", "--train-data", f"{folder}/pairs.csv", "--logs", str(folder), *run]) == 0
    return {
        "SHARDS": f"{folder}/{{00000..00001}}.tar", "TABLE": f"{folder}/pairs.csv", "IMAGENET": f"{folder}/val",
        "WEIGHTS": f"{folder}/weights.pt", "CHECKPOINT": f"{folder}/before/checkpoints/epoch_latest.pt",
        "REMOTE": f"file://{folder}/remote",
    }  # fmt: skip


def located(words, places):
    """The words with small data in the place of each path."""
    pattern = re.compile("|".join(places))
    return [pattern.sub(lambda match: places[match[0]], word) for word in words]


def smaller(words):
    """The words of a command for two steps of a small model."""
    found = list(words)
    for place, flag in enumerate(words[:-1]):
        found[place + 1] = SMALLER.get(flag, found[place + 1])
    for flag in ("--train-num-samples", "--epochs", "--batch-size", "--model", "--workers", "--warmup"):
        is_new = "--resume" not in words and flag not in words
        found += [flag, SMALLER[flag]] if is_new else []
    if "--accum-freq" in found:
        passes = int(found[found.index("--accum-freq") + 1])
        found[found.index("--train-num-samples") + 1] = str(16 * passes)
    return found


@pytest.fixture(autouse=True)
def one_prompt(monkeypatch):
    """One prompt in place of 80."""
    monkeypatch.setattr("clipfast.evaluation.imagenet.OPENAI_IMAGENET_TEMPLATES", ("{}",))
    monkeypatch.setattr(zero_shot, "TEMPLATES", zero_shot.TEMPLATES | {"openai": ("{}",)})


def test_there_are_enough():
    assert len(COMMANDS) >= 30
    assert len(RUNS) >= 17


def numbers(text: str) -> list[float] | str:
    """The numbers that a text stands for, or the text. Of several below 1, only the ratio counts."""
    try:
        found = [float(part) for part in re.split("::| ", text)]
    except ValueError:
        return text
    return found if len(found) == 1 or max(found) >= 1 else [number / max(found) for number in found]


@pytest.mark.parametrize("name", RUNS)
def test_all_options_of_a_command_are_taken_as_they_are(name, places, capsys):
    words = located(words_of(name), places)
    code, out, err = run_command(capsys, "train", *words, "--print-config")
    assert code == 0, err
    shown = rows(out)
    passes = int(words[words.index("--accum-freq") + 1]) if "--accum-freq" in words else 1
    for flag, value in itertools.pairwise(words):
        if flag in shown and not value.startswith("--"):
            expected = str(passes * int(value)) if flag == "--batch-size" else value
            assert numbers(shown[flag][0]) == numbers(expected), flag


@pytest.mark.parametrize("name", RUNS)
def test_a_command_runs(name, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = located(smaller(words_of(name)), places)
    is_training = "--train-data" in words or "synthetic" in words
    if is_training and "--resume" not in words and "--name" not in words:
        words += ["--name", "run"]
    if "CHECKPOINT" in COMMANDS[name][1]:
        words += ["--epochs", "2"]
    code, out, err = run_command(capsys, "train", *words)
    assert code == 0, err
    results = json.loads(out[out.index("{") :].split("\n}\n")[0] + "\n}")
    if is_training:
        steps = 4 if "CHECKPOINT" in COMMANDS[name][1] else 2
        pairs = 16 * int(words[words.index("--accum-freq") + 1]) if "--accum-freq" in words else 16
        assert (results["steps"], results["samples_seen"]) == (steps, steps // 2 * pairs)
        assert 0 < results["train_loss"] < 10
    if "IMAGENET" in COMMANDS[name][1]:
        assert 0 <= results.get("imagenet-zeroshot-val-top1", results.get("zero_shot", {}).get("top1")) <= 0.1


@pytest.mark.parametrize("name", REFUSED)
def test_a_command_that_does_not_run_says_why(name, places, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = located(words_of(name), places)
    words = ["tensorboard" if word == "wandb" else word for word in words]  # which is not installed everywhere
    code, _, err = run_command(capsys, "train", *words)
    assert code == 2
    assert COMMANDS[name][2] in err
    assert not list(tmp_path.glob("*/*/checkpoints"))


@pytest.mark.parametrize("name", [name for name in REFUSED if EXAMPLES in COMMANDS[name][0]])
def test_of_the_others_only_the_model_is_unknown(name, places, capsys, tmp_path, monkeypatch):
    """With a small model in the place of its own, each of them runs too."""
    monkeypatch.chdir(tmp_path)
    words = located(smaller(words_of(name)), places)
    code, out, err = run_command(capsys, "train", *words)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2


def on_machine(rank, starter):
    """The variables of one of two processes that torchrun or srun starts."""
    if starter == "torchrun":
        return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    return {
        "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_STEP_NUM_TASKS": 2,
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("name", "starter"), [("one node", "torchrun"), ("slurm", "srun")])
def test_commands_for_several_processes(name, starter, places, tmp_path):
    words = [*located(smaller(words_of(name)), places), "--device", "cpu", "--logs", str(tmp_path), "--name", "run"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank in range(2):
        variables = on_machine(rank, starter) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in variables.items()}
        command = [sys.executable, "-m", "clipfast", "train", *words]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert json.loads(outputs[0])["samples_seen"] == 16
    assert "1 steps of 16 pairs (8 on each of 2 processes)" in (tmp_path / "run" / "out.log").read_text()
