"""``clipfast run`` with a trainer of OpenCLIP: it prints the same losses, and writes the same checkpoints."""

import json
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import clipfast

from ..processes import run_ranks
from ..small_runs import TINY
from .test_run import LINE, MODEL_LINE, python, stand_in_for_pandas

SHARDS = [Path(clipfast.__file__).parent / "assets" / "emoji" / f"{style}.tar.gz" for style in ("fluent", "noto")]
# This program runs OpenCLIP's trainer for each list of options in turn, so Python and PyTorch start only once. It takes
# away OpenCLIP's shuffle buffer, since OpenCLIP seeds its shuffle from the clock. It replaces DistributedDataParallel,
# to which OpenCLIP gives device_ids that CPUs may not have, and the layers of bitsandbytes, which need a GPU.
PROGRAM = """
import json, logging, sys, types
import open_clip, torch
from open_clip_train import data, main
open_clip.add_model_config("models")
data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = 1
class OnCPU(torch.nn.parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **options):
        super().__init__(module, **options)
torch.nn.parallel.DistributedDataParallel = OnCPU
class OtherLinear(torch.nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)
layers = types.SimpleNamespace(triton_based_modules=types.SimpleNamespace(OtherLinear=OtherLinear))
sys.modules["bitsandbytes"] = types.SimpleNamespace(nn=layers)
for options in json.loads(sys.argv[1]):
    logging.getLogger().handlers.clear()
    main.main(options)
    torch.distributed.init_process_group = lambda **options: None  # once for all runs
"""

KINDS = {
    "clip": ["tiny"],
    "siglip": ["tiny", "--siglip"],
    "distill": ["tiny", "--distill-model", "tiny", "--distill-pretrained", "teacher.pt"],
    "coca": ["coca_tiny", "--pretrained", "coca.pt"],
}
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 2}


def prepare(folder, models):
    """Write the program and the models' configurations that ``clipfast run`` trains into a folder."""
    (folder / "trainer.py").write_text(PROGRAM)
    (folder / "models").mkdir()
    for name, config in models.items():
        (folder / "models" / f"{name}.json").write_text(json.dumps(config))
    stand_in_for_pandas(folder)


def trainer_options(model, name, logs, steps=4, batch=8):
    """Return the options of OpenCLIP's trainer; it logs each step in the folder ``logs``/``name``."""
    return [
        "--model", model, "--train-data", "::".join(map(str, SHARDS)), "--dataset-type", "webdataset",
        "--train-num-samples", str(steps * batch), "--batch-size", str(batch), "--epochs", "1", "--lr", "1e-4",
        "--warmup", "1", "--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1", "--logs", logs,
        "--name", name, "--save-frequency", "0", "--workers", "0",
    ]  # fmt: skip


def command(ranks):
    """Return the arguments of ``python`` that run PROGRAM by ``clipfast.run``, without the program's own arguments."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [*start, "-m", "clipfast.run", "trainer"]


def as_their_rank(rank, folder, ranks, runs):
    """Run PROGRAM with OpenCLIP's own parts in a forked process, where OpenCLIP is imported already."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    if ranks > 1:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
    sys.argv = ["trainer", runs]
    with mock.patch.object(torch.distributed, "init_process_group"):  # the process group of the ranks exists
        runpy.run_path("trainer.py", run_name="__main__")


def printed_losses(folder):
    """Return, for each run in ``folder``, the names and values of the losses in each line of its log."""
    found = {}
    for path in folder.glob("*/out.log"):
        lines = [line for line in path.read_text().splitlines() if "Train Epoch" in line]
        found[path.parent.name] = [re.findall(r"(\w*[Ll]oss): (\S+)", line) for line in lines]
    return found


@pytest.fixture
def training(tmp_path):
    """Write the data and the program for OpenCLIP's trainer, and return their folder."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("open_clip_train")
    config = json.loads(Path(TINY).read_text())
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "teacher.pt")
    vision = config["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = config["text_cfg"] | {"embed_cls": True, "output_tokens": True}
    coca = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": COCA, "custom_text": True}
    prepare(tmp_path, {"tiny": config, "coca_tiny": coca})
    # OpenCLIP leaves some weights of its CoCa uninitialized, so runs start from these weights in a file.
    weights = open_clip.CoCa(**{name: value for name, value in coca.items() if name != "custom_text"}).state_dict()
    for name, x in weights.items():
        if name != "logit_scale" and not name.endswith("attn_mask"):
            weights[name] = 0.1 * torch.randn_like(x)
    torch.save(weights, tmp_path / "coca.pt")
    return tmp_path


def options_of(kind, name, logs, *more):
    """Return the options of OpenCLIP's trainer, which ``clipfast run`` runs, for the training ``kind`` of KINDS."""
    model, *options = KINDS[kind]
    return [*trainer_options(model, name, logs), *options, *more]


def compare_trainings(folder, ranks, runs):
    """Compare trainings with and without ``clipfast.run`` on ``ranks`` processes; ``runs`` has each run's options."""
    theirs, ours = (
        json.dumps([options_of(kind, f"{index}", logs, *more) for index, (kind, *more) in enumerate(runs)])
        for logs in ("theirs", "ours")
    )
    (folder / "ranks").mkdir()
    run_ranks(as_their_rank, ranks, str(folder), ranks, theirs, folder=folder / "ranks", timeout=300.0)
    found = python(folder, *command(ranks), ours)
    assert found.returncode == 0, found.stderr[-3000:]
    said = [line for line in found.stderr.splitlines() if line.startswith("clipfast: ")]
    assert said[:2] == [LINE, MODEL_LINE]
    assert all(line.startswith("clipfast: a ") for line in said[2:])
    models = len(runs) + sum(kind == "distill" for kind, *_ in runs)
    assert len(said) == 2 + models
    ours, theirs = (printed_losses(folder / logs) for logs in ("ours", "theirs"))
    assert len(ours) == len(runs)
    assert ours == theirs
    for losses in ours.values():
        assert losses
        assert losses[0] != losses[-1]
        assert all(float(number) > 0 for line in losses for _, number in line)


@pytest.mark.long
def test_losses_and_checkpoints_are_those_of_open_clip(training):
    path = "{}/0/checkpoints/epoch_1.pt"
    options = (
        "--save-frequency 1", f"--epochs 2 --resume {path.format('theirs')}", "--torchscript",
        "--grad-checkpointing --lock-image --force-patch-dropout 0.5", "--use-bnb-linear OtherLinear",
        "--lock-text --lock-text-freeze-layer-norm --accum-freq 2",
    )  # fmt: skip
    compare_trainings(training, 1, [["clip", *more.split()] for more in options])
    ours, theirs = (torch.load(training / path.format(logs), weights_only=True) for logs in ("ours", "theirs"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_open_clip_trains_on_two_ranks_with_the_same_printed_losses(training):
    mode = ["--local-loss", "--gather-with-grad"]
    runs = [["clip"], ["clip", *mode], ["distill", *mode], ["siglip"], ["coca", *mode]]
    compare_trainings(training, 2, runs)
