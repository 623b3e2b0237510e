"""SigLIP from the command line: training by the sigmoid loss, resumed runs, zero-shot evaluation, and refusals."""

import json

import pytest
import torch

from clipfast import SigLipLoss, build_zero_shot_classifier, create_model, get_tokenizer
from clipfast.evaluate.zero_shot import encode_texts
from clipfast.models import SigLIPConfig, TextConfig, VisionConfig, registry
from clipfast.models.file_tokenizer import FileTokenizer
from clipfast.runs.folder import RunFolder
from clipfast.train.data import TrainingData
from clipfast.train.train_config import TrainConfig
from clipfast.verify.models import verify_model

from ..models.siglip import CONFIGS, known_to_timm, make_model, save_tokenizer
from ..small_runs import output_of, run_command, sample, write_shard
from .test_training import losses

pytest.importorskip("tokenizers")
pytest.importorskip("braceexpand")

CONFIG = SigLIPConfig(32, VisionConfig(24, 1, 32, 16, 2.0, 8), TextConfig(24, 300, 32, 2, 1))


@pytest.fixture
def arguments(shards, tmp_path):
    """Return the arguments of ``clipfast train`` for a small SigLIP model."""
    (tmp_path / "small.json").write_text(json.dumps(CONFIG.to_dict()))
    save_tokenizer(tmp_path / "tokenizer")
    return [
        "train", "--train-data", shards, "--model", tmp_path / "small.json", "--tokenizer", tmp_path / "tokenizer",
        "--batch-size", 16, "--epochs", 6, "--warmup", 2, "--lr", "3e-3", "--workers", 0, "--logs", tmp_path,
        "--name", "run", "--log-every-n-steps", 1, "--val-data", shards, "--crop-scale", 1, 1,
    ]  # fmt: skip


@pytest.mark.long
def test_training_evaluation_and_resuming(arguments, shards, tmp_path, capsys):
    out, error = output_of(capsys, *arguments)
    found = losses(RunFolder(tmp_path / "run"))
    assert len(found) == 18
    assert found[0] > 9  # logit_bias begins at -10, so the loss of each matching pair is about 10
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    # the run's folder can be loaded as a model, with its tokenizer and preprocessing
    name = f"local-dir:{tmp_path}/run"
    model = create_model(name)
    assert model.config == CONFIG
    assert get_tokenizer(name)("a cat").shape == (1, 24)
    out, error = output_of(capsys, "eval", "zeroshot", "--model", name, "--data", shards)
    figures, trained = json.loads(out), json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures["zero_shot"] == trained["zero_shot"]
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_latest.pt"
    evaluate = ["eval", "zeroshot", "--model", checkpoint, "--data", shards]
    code, out, error = run_command(capsys, *evaluate)
    assert (code, out) == (2, "")
    assert "needs the file tokenizer.json of its tokenizer" in error
    code, out, error = run_command(capsys, *evaluate, "--tokenizer", tmp_path / "tokenizer")
    assert json.loads(out)["retrieval"] == figures["retrieval"]
    # a resumed run finds its tokenizer without --tokenizer
    out, error = output_of(capsys, "train", "--resume", tmp_path / "run", "--epochs", 7)
    assert len(losses(RunFolder(tmp_path / "run"))) == 21


@pytest.mark.long
def test_the_first_loss_is_the_sigmoid_loss(arguments, tmp_path, capsys):
    """Texts keep their padding in training, and a run with micro-batches has the loss of the whole batch."""
    output_of(capsys, *arguments, "--siglip", "--epochs", 1, "--micro-batch-size", 6)
    torch.manual_seed(0)
    config = TrainConfig(train_data=str(arguments[2]), batch_size=16, workers=0, crop_scale=(1.0, 1.0))
    registry.add_model_config(tmp_path / "small.json")
    model = create_model("small").train()
    tokenizer = get_tokenizer("small", tokenizer_file=tmp_path / "tokenizer")
    batch = next(TrainingData(config).batches(0, model, tokenizer, pin_memory=False))
    assert batch.texts.shape == (16, 24)
    assert (batch.texts[:, -1] == 1).all()
    expected = SigLipLoss()(*model(batch.images, batch.texts)).item()
    assert losses(RunFolder(tmp_path / "run"))[0] == pytest.approx(expected, rel=1e-5)


def test_zero_shot_reads_the_padding(tmp_path):
    save_tokenizer(tmp_path)
    model = make_model(CONFIG)
    tokenizer = FileTokenizer(tmp_path, 24)
    names, templates = ["red cat", "dog", "blue thing"], ["a photo of a {}.", "{}"]
    weights = build_zero_shot_classifier(model, tokenizer, names, templates)
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    with torch.no_grad():
        rows = [model.encode_text(tokenizer(texts), normalize=True).mean(0) for texts in prompts]
        expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).T
        torch.testing.assert_close(weights, expected)
        assert encode_texts(model, tokenizer, ["a"], "cpu").shape == (1, 32)


@pytest.mark.usefixtures("arguments")
def test_what_is_refused(tmp_path, refusal):
    write_shard(tmp_path / "x.tar", [sample(number) for number in range(8)])
    siglip = {"model": tmp_path / "small.json", "tokenizer": tmp_path / "tokenizer"}
    assert "small.json is a SigLIP model, which is trained with the sigmoid loss" in refusal("--no-siglip", **siglip)
    assert "tiny.json has CLIP's tokenizer, which needs no file" in refusal(tokenizer=tmp_path)


@pytest.mark.parametrize("peer", ["model", "openclip", "hf"])
def test_verification(peer, tmp_path, monkeypatch):
    """``clipfast verify`` compares a SigLIP model with its reference, OpenCLIP and transformers."""
    if peer != "model":
        pytest.importorskip({"openclip": "open_clip", "hf": "transformers"}[peer])
    (tmp_path / "small-siglip.json").write_text(json.dumps(CONFIGS["mixed"].to_dict()))
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    registry.add_model_config(tmp_path / "small-siglip.json")
    with known_to_timm(CONFIGS["mixed"]):
        rows = verify_model(peer, "small-siglip", "cpu", "float32", quick=True)
    assert {row.verdict for row in rows} == {"PASS"}
    assert len(rows) > 70
