"""``clipfast run`` with a trainer of OpenCLIP: it prints the same losses, and writes the same checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from clipfast.bench.adoption import trainer

from .conftest import TINY
from .test_run import LINE, MODEL_LINE, python

KINDS = {
    "clip": ["tiny"],
    "siglip": ["tiny", "--siglip"],
    "distill": ["tiny", "--distill-model", "tiny", "--distill-pretrained", "teacher.pt"],
    "coca": ["coca_tiny", "--pretrained", "coca.pt"],
}
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, "mlp_ratio": 2}


@pytest.fixture
def training(tmp_path):
    """A folder with what the trainer needs."""
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("open_clip_train")
    config = json.loads(Path(TINY).read_text())
    torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "teacher.pt")
    vision = config["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = config["text_cfg"] | {"embed_cls": True, "output_tokens": True}
    coca = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": COCA, "custom_text": True}
    trainer.prepare(tmp_path, {"tiny": config, "coca_tiny": coca})
    # OpenCLIP leaves some weights of its CoCa uninitialised.
    weights = open_clip.CoCa(**{name: value for name, value in coca.items() if name != "custom_text"}).state_dict()
    for name, x in weights.items():
        if name != "logit_scale" and not name.endswith("attn_mask"):
            weights[name] = 0.1 * torch.randn_like(x)
    torch.save(weights, tmp_path / "coca.pt")
    return tmp_path


def options_of(kind, name, logs, *more):
    model, *options = KINDS[kind]
    return [*trainer.options(model, name, logs, steps=4, batch=16), *options, *more]


def compare_trainings(folder, ranks, runs):
    """Train without our parts and with them, on ``ranks`` processes; ``runs`` has the kind and the options of each."""
    for logs in ("theirs", "ours"):
        options = [options_of(kind, f"{index}", logs, *more) for index, (kind, *more) in enumerate(runs)]
        found = python(folder, *trainer.command(ranks, ours=logs == "ours"), json.dumps(options))
        assert found.returncode == 0, found.stderr[-3000:]
        said = [line for line in found.stderr.splitlines() if line.startswith("clipfast: ")]
        assert said[:2] == ([LINE, MODEL_LINE] if logs == "ours" else [])
        assert all(line.startswith("clipfast: a ") for line in said[2:])
        models = len(runs) + sum(kind == "distill" for kind, *_ in runs)
        assert len(said) == (2 + models if logs == "ours" else 0)
    ours, theirs = (trainer.printed_losses(folder / logs) for logs in ("ours", "theirs"))
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
    compare_trainings(training, 1, [*([kind] for kind in KINDS), *(["clip", *more.split()] for more in options)])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_steps(ranks, training):
    options = ["--train-num-samples", str(50 * 16 * ranks)]
    compare_trainings(training, ranks, [["clip", *options]])
    assert len(trainer.printed_losses(training / "ours")["0"]) == 50


@pytest.mark.long
def test_checkpoints_are_those_of_open_clip(training):
    path = "{}/0/checkpoints/epoch_1.pt"
    resume = ["clip", "--epochs", "2", "--resume"]
    compare_trainings(training, 1, [["clip", "--save-frequency", "1"], [*resume, path.format("theirs")]])
    ours, theirs = (torch.load(training / path.format(logs), weights_only=True) for logs in ("ours", "theirs"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    again = options_of("clip", "again", "theirs", *resume[1:], path.format("ours"))
    assert python(training, "-m", "trainer", json.dumps([again])).returncode == 0
    losses = trainer.printed_losses(training / "theirs")
    assert losses["again"] == losses["1"]


@pytest.mark.long
def test_open_clip_trains_on_two_ranks_with_the_same_printed_losses(training):
    modes = [], ["--local-loss"], ["--gather-with-grad"], ["--local-loss", "--gather-with-grad"]
    runs = [["clip", *mode] for mode in modes] + [["distill", *modes[-1]], ["siglip"], ["coca", *modes[-1]]]
    compare_trainings(training, 2, runs)
