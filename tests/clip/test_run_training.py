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
def test_losses_and_checkpoints_are_those_of_open_clip(training):
    path = "{}/0/checkpoints/epoch_1.pt"
    options = (
        "--save-frequency 1", f"--epochs 2 --resume {path.format('theirs')}", "--grad-checkpointing --lock-image",
        "--lock-text --lock-text-freeze-layer-norm --accum-freq 2", "--force-patch-dropout 0.5", "--torchscript",
        "--use-bnb-linear OtherLinear",
    )  # fmt: skip
    others = [["siglip"], ["distill"], ["coca"]]
    compare_trainings(training, 1, [*(["clip", *more.split()] for more in options), *others])
    ours, theirs = (torch.load(training / path.format(logs), weights_only=True) for logs in ("ours", "theirs"))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_open_clip_trains_on_two_ranks_with_the_same_printed_losses(training):
    mode = ["--local-loss", "--gather-with-grad"]
    runs = [["clip"], ["clip", *mode[:1]], ["clip", *mode], ["distill", *mode], ["siglip"], ["coca", *mode]]
    compare_trainings(training, 2, runs)
