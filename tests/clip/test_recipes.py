"""Recipes: every bundled one is whole and names no data, what differs by model, and the options with their origins."""

import dataclasses
import re

import pytest

from clipfast import get_model_config, list_models
from clipfast.training import TrainConfig, list_recipes, read_recipe
from clipfast.training.loop import train
from clipfast.training.recipes import BY_MODEL, describe

from .conftest import TINY, run_command
from .test_training import config

OWN_DATA = ("train_data", "val_data")  # of recipes whose data ships with the package, or is drawn


def rows(text):
    """The lines of a description by flag: value and origin."""
    lines = [re.fullmatch(r"(--\S+) +(.*?) +\((.*)\)", line).groups() for line in text.splitlines()]
    return {flag: [value, origin] for flag, value, origin in lines}


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_whole_and_names_no_data(name):
    recipe = read_recipe(name)
    assert recipe["model"] in list_models()
    assert name in ("emoji", "shapes") or not set(recipe) & {*OWN_DATA, "name", "logs", "pretrained", "resume"}
    TrainConfig(**({"train_data": "x.tar"} | recipe))


def test_the_recipes_that_there_are():
    openclip = ["openclip-defaults", "openclip-laion"]
    assert list_recipes() == ["clip-paper", "emoji", "finetune", "lit", *openclip, "shapes", "siglip"]
    assert TrainConfig(**read_recipe("emoji")).unique_by == "label"


# Radford et al. 2021, tables 19 and 20
RATES = {
    "RN50": 5e-4, "RN101": 5e-4, "RN50x4": 5e-4, "RN50x16": 4e-4, "RN50x64": 3.6e-4, "ViT-B-32": 5e-4, "ViT-B-16": 5e-4,
    "ViT-L-14": 4e-4, "ViT-L-14-336": 2e-5,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", "-quickgelu"])
@pytest.mark.parametrize("model", RATES)
def test_the_paper_has_a_rate_for_each_model(model, suffix):
    recipe = read_recipe("clip-paper", model + suffix)
    assert recipe["lr"] == RATES[model]
    assert recipe["epochs"] == (1 if model.endswith("336") else 32)
    assert BY_MODEL not in recipe
    assert get_model_config(model + suffix)


def test_what_a_recipe_says_by_model(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'model = "A"\nlr = 1.0\n[by-model.A]\nlr = 2.0\n[by-model.B]\nbatch-size = 4\ncrop-scale = [0.5, 1]'
    )
    assert read_recipe(str(mine)) == {"model": "A", "lr": 2.0}
    assert read_recipe(str(mine), "B") == {"model": "A", "lr": 1.0, "batch_size": 4, "crop_scale": (0.5, 1)}
    assert read_recipe(str(mine), "C") == {"model": "A", "lr": 1.0}
    for text, message in (
        ("by_model = 3", "by_model must hold a table for each model"),
        ("[by_model]\nRN50 = 3", "by_model must hold a table for each model, such as"),
        ("[by_model.RN50]\nrate = 3", "has unknown options: rate"),
        ("by_model = [1]", "by_model must hold a table for each model"),
        ("[by_model.RN50.by_model.RN50]\nlr = 3", "has unknown options: by_model"),
    ):
        mine.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(str(mine))


def test_every_option_is_printed_with_its_origin(capsys):
    code, out, error = run_command(
        capsys, "train", "--recipe", "clip-paper", "--model", "ViT-L-14", "--epochs", 3, "--print-config"
    )
    assert (code, error) == (0, "")
    found = rows(out)
    assert len(found) == len(dataclasses.fields(TrainConfig))
    assert found["--epochs"] == ["3", "flag"]
    assert found["--model"] == ["ViT-L-14", "flag"]
    assert found["--lr"] == ["0.0004", "recipe clip-paper"]
    assert found["--crop-scale"] == ["0.9 1.0", "recipe clip-paper"]
    assert found["--seed"] == ["0", "default"]
    assert found["--train-data"] == ["(needed)", "nowhere"]
    # of two options that exclude each other, the flag takes the place of the recipe's
    code, out, error = run_command(capsys, "train", "--recipe", "clip-paper", "--samples-seen", 9, "--print-config")
    assert code == 0, error
    assert {rows(out)["--samples-seen"][1], rows(out)["--epochs"][1]} == {"flag", "default"}
    for flag in ("--batch-size", "--global-batch-size"):
        code, out, error = run_command(capsys, "train", "--recipe", "clip-paper", flag, 8, "--print-config")
        assert code == 0, error
        assert (rows(out)[flag], rows(out)["--epochs"]) == (["8", "flag"], ["32", "recipe clip-paper"])
        assert {rows(out)["--batch-size"][1], rows(out)["--global-batch-size"][1]} == {"flag", "default"}
    # it is checked like the options of a run
    code, out, error = run_command(capsys, "train", "--recipe", "clip-paper", "--batch-size", 0, "--print-config")
    assert (code, out) == (2, "")
    assert "--batch-size must be more than 0" in error


def test_a_run_keeps_a_list_of_its_options(shards, tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(f'model = "{TINY}"\nbatch_size = 8\nepochs = 1\nwarmup = "auto"\nworkers = 0')
    options = ["--train-data", shards, "--logs", tmp_path, "--name", "run"]
    code, _, error = run_command(capsys, "train", "--recipe", tmp_path / "mine.toml", *options)
    assert code == 0, error
    found = rows((tmp_path / "run" / "params.txt").read_text())
    assert found["--warmup"] == ["auto", f"recipe {tmp_path}/mine.toml"]
    assert found["--name"] == ["run", "flag"]
    code, out, error = run_command(capsys, "train", "--resume", tmp_path / "run", "--epochs", 2, "--print-config")
    assert code == 0, error
    found = rows(out)
    assert found["--epochs"] == ["2", "flag"]
    assert found["--batch-size"] == ["8", f"checkpoint {tmp_path}/run/checkpoints/epoch_latest.pt"]
    # the batch of all processes comes before that of each, which stays as it was
    code, out, error = run_command(
        capsys, "train", "--resume", tmp_path / "run", "--global-batch-size", 16, "--print-config"
    )
    assert code == 0, error
    assert rows(out)["--batch-size"] == found["--batch-size"]
    assert rows(out)["--global-batch-size"] == ["16", "flag"]
    assert rows((tmp_path / "run" / "params.txt").read_text())["--epochs"] == ["1", f"recipe {tmp_path}/mine.toml"]


def test_options_of_python_have_an_origin_too(shards, tmp_path):
    options = config(shards, tmp_path, epochs=1, workers=0)
    folder, _ = train(options)
    assert (folder.path / "params.txt").read_text() == describe(options, {}) + "\n"
    found = rows(describe(options, {}))
    assert found["--epochs"] == ["1", "given"]
    assert found["--wd"] == ["0.2", "default"]
