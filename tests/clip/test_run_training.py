"""``clipfast run`` with a trainer of OpenCLIP: it prints the same losses, and writes the same checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch

from .conftest import TINY
from .test_run import EMOJI, LINE, MODEL_LINE, python, stand_in_for_pandas

# Their trainer, once for each loss, so that Python and PyTorch start once. Without a buffer, their loader does not
# shuffle, which it does by the clock. Their DistributedDataParallel names devices, which CPUs may not have. Layers of
# bitsandbytes need a GPU.
TRAINER = """
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
    "clip": ["--model", "tiny"],
    "siglip": ["--model", "tiny", "--siglip"],
    "distill": ["--model", "tiny", "--distill-model", "tiny", "--distill-pretrained", "teacher.pt"],
    "coca": ["--model", "coca_tiny", "--pretrained", "coca.pt"],
}
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 2}


@pytest.fixture
def training(tmp_path):
    """A folder with what TRAINER needs."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("open_clip_train")
    stand_in_for_pandas(tmp_path)
    (tmp_path / "models").mkdir()
    config = json.loads(Path(TINY).read_text())
    (tmp_path / "models" / "tiny.json").write_text(json.dumps(config))
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "teacher.pt")
    vision = config["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = config["text_cfg"] | {"embed_cls": True, "output_tokens": True}
    coca = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": COCA, "custom_text": True}
    (tmp_path / "models" / "coca_tiny.json").write_text(json.dumps(coca))
    # OpenCLIP leaves some weights of its CoCa uninitialised.
    weights = open_clip.CoCa(**{name: value for name, value in coca.items() if name != "custom_text"}).state_dict()
    for name, x in weights.items():
        if name != "logit_scale" and not name.endswith("attn_mask"):
            weights[name] = 0.1 * torch.randn_like(x)
    torch.save(weights, tmp_path / "coca.pt")
    (tmp_path / "trainer.py").write_text(TRAINER)
    return tmp_path


def options_of(kind, name, logs, *more, batch=16):
    data = "::".join(str(EMOJI / f"{style}.tar.gz") for style in ("fluent", "noto"))
    return [
        *KINDS[kind], "--train-data", data, "--dataset-type", "webdataset", "--train-num-samples", str(4 * batch),
        "--batch-size", str(batch), "--epochs", "1", "--lr", "1e-4", "--warmup", "1", "--precision", "fp32", "--device",
        "cpu", "--log-every-n-steps", "1", "--logs", logs, "--name", name, "--save-frequency", "0",
        "--workers", "0", *more,
    ]  # fmt: skip


def printed_losses(folder):
    """The losses that each run has logged, as they are printed: a list for each step."""
    found = {}
    for path in folder.glob("*/out.log"):
        lines = [line for line in path.read_text().splitlines() if "Train Epoch" in line]
        found[path.parent.name] = [re.findall(r"(\w*[Ll]oss): (\S+)", line) for line in lines]
    return found


def compare_trainings(folder, start, runs):
    """Train with OpenCLIP's losses and with ours, after ``start``; ``runs`` has the kind and the options of each."""
    for logs, call in (("theirs", ["-m"]), ("ours", ["-m", "clipfast.run"])):
        options = [options_of(kind, f"{index}", logs, *more) for index, (kind, *more) in enumerate(runs)]
        found = python(folder, *start, *call, "trainer", json.dumps(options))
        assert found.returncode == 0, found.stderr[-3000:]
        said = [line for line in found.stderr.splitlines() if line.startswith("clipfast: ")]
        assert said[:2] == ([LINE, MODEL_LINE] if logs == "ours" else [])
        assert all(line.startswith("clipfast: a ") for line in said[2:])
        models = len(runs) + sum(kind == "distill" for kind, *_ in runs)
        assert len(said) == (2 + models if logs == "ours" else 0)
    ours, theirs = (printed_losses(folder / logs) for logs in ("ours", "theirs"))
    assert len(ours) == len(runs)
    assert ours == theirs
    for losses in ours.values():
        assert losses
        assert losses[0] != losses[-1]
        assert all(float(number) > 0 for line in losses for _, number in line)


@pytest.mark.long
def test_open_clip_trains_with_the_same_printed_losses(training):
    options = (
        "--grad-checkpointing", "--lock-image", "--lock-text --lock-text-freeze-layer-norm", "--accum-freq 2",
        "--force-patch-dropout 0.5", "--torchscript", "--use-bnb-linear OtherLinear",
    )  # fmt: skip
    compare_trainings(training, [], [*([kind] for kind in KINDS), *(["clip", *more.split()] for more in options)])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_steps(ranks, training):
    options = ["--train-num-samples", str(50 * 16 * ranks)]
    compare_trainings(training, TWO_RANKS if ranks == 2 else [], [["clip", *options]])
    assert len(printed_losses(training / "ours")["0"]) == 50


@pytest.mark.long
def test_checkpoints_are_those_of_open_clip(training):
    path = "{}/0/checkpoints/epoch_1.pt"
    resume = ["clip", "--epochs", "2", "--resume"]
    compare_trainings(training, [], [["clip", "--save-frequency", "1"], [*resume, path.format("theirs")]])
    ours, theirs = (torch.load(training / path.format(logs), weights_only=True) for logs in ("ours", "theirs"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    again = options_of("clip", "again", "theirs", *resume[1:], path.format("ours"))
    assert python(training, "-m", "trainer", json.dumps([again])).returncode == 0
    losses = printed_losses(training / "theirs")
    assert losses["again"] == losses["1"]


@pytest.mark.long
def test_open_clip_trains_on_two_ranks_with_the_same_printed_losses(training):
    modes = [], ["--local-loss"], ["--gather-with-grad"], ["--local-loss", "--gather-with-grad"]
    runs = [["clip", *mode] for mode in modes] + [["distill", *modes[-1]], ["siglip"], ["coca", *modes[-1]]]
    compare_trainings(training, TWO_RANKS, runs)
