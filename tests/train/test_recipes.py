"""Recipes: bundled ones are complete and name no data; options by model; and printed options with their origins."""

import dataclasses
import functools
import re

import pytest

from clipfast import list_models
from clipfast.train import TrainConfig, list_recipes, read_recipe
from clipfast.train.recipes import BY_MODEL

from ..small_runs import TINY, output_of, run_command

OWN_DATA = ("train_data", "val_data")  # options of recipes whose data ships with the package, or is drawn


def rows(text):
    """Parse the lines that describe training options: value and origin by flag."""
    lines = [re.fullmatch(r"(--\S+) +(.*?) +\((.*)\)", line).groups() for line in text.splitlines()]
    return {flag: [value, origin] for flag, value, origin in lines}


def printed_options(capsys, *words):
    """Return the options, with their origins, that ``clipfast train`` prints for the words of a command."""
    return rows(output_of(capsys, "train", *words, "--print-config")[0])


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_is_whole_and_names_no_data(name):
    recipe = read_recipe(name)
    assert recipe["model"] in list_models()
    assert name in ("emoji", "shapes") or not set(recipe) & {*OWN_DATA, "name", "logs", "pretrained", "resume"}
    TrainConfig(**({"train_data": "x.tar"} | recipe))


@pytest.mark.parametrize(("model", "rate", "epochs"), [("RN50x64", 3.6e-4, 32), ("ViT-L-14-336", 2e-5, 1)])
def test_the_paper_has_a_rate_for_each_model(model, rate, epochs):
    for name in (model, f"{model}-quickgelu"):
        recipe = read_recipe("clip-paper", name)
        assert (recipe["lr"], recipe["epochs"]) == (rate, epochs)
        assert BY_MODEL not in recipe


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


@pytest.fixture
def printed(capsys):
    """Return a function that returns the options that ``clipfast train`` prints, with their origins."""
    return functools.partial(printed_options, capsys)


def test_every_option_is_printed_with_its_origin(printed, capsys):
    paper = ["--recipe", "clip-paper"]
    found = printed(*paper, "--model", "ViT-L-14", "--epochs", 3)
    assert len(found) == len(dataclasses.fields(TrainConfig))
    assert {
        "--epochs": ["3", "flag"], "--model": ["ViT-L-14", "flag"], "--lr": ["0.0004", "recipe clip-paper"],
        "--crop-scale": ["0.9 1.0", "recipe clip-paper"], "--seed": ["0", "default"],
        "--train-data": ["(needed)", "nowhere"],
    }.items() <= found.items()  # fmt: skip
    # a flag replaces an option of the recipe that excludes the flag: --samples-seen replaces --epochs
    found = printed(*paper, "--samples-seen", 9)
    assert {found["--samples-seen"][1], found["--epochs"][1]} == {"flag", "default"}
    for flag in ("--batch-size", "--global-batch-size"):
        found = printed(*paper, flag, 8)
        assert (found[flag], found["--epochs"]) == (["8", "flag"], ["32", "recipe clip-paper"])
        assert {found["--batch-size"][1], found["--global-batch-size"][1]} == {"flag", "default"}
    # printed options are checked like the options of a run
    code, out, error = run_command(capsys, "train", *paper, "--batch-size", 0, "--print-config")
    assert (code, out) == (2, "")
    assert "--batch-size must be more than 0" in error


def test_flags_replace_the_options_for_naflex_that_they_exclude(tmp_path, printed):
    recipe = tmp_path / "naflex.toml"
    tokens, pairs = ("--naflex-num-train-image-tokens", "--train-num-samples")
    for first, then in ((tokens, pairs), (pairs, tokens)):
        recipe.write_text(f"use_naflex = true\nnaflex_seq_lens = [4, 9]\nnaflex_batch_divisor = 4\n{first[2:]} = 99999")
        found = printed("--recipe", recipe, then, 88888)
        assert (found[then], found[first][1]) == (["88888", "flag"], "default")
        found = printed("--recipe", recipe, "--no-use-naflex")
        assert found["--use-naflex"] == ["False", "flag"]
        assert {origin for flag, (*_, origin) in found.items() if flag.startswith("--naflex")} == {"default"}
        assert found[pairs][1] == ("default" if first == tokens else f"recipe {recipe}")


def test_another_precision_drops_the_options_of_8_bits(tmp_path, printed):
    recipe = tmp_path / "fp8.toml"
    recipe.write_text('precision = "amp_fp8"\nfp8_recipe = "full"\nfp8_skip = [1, 1]')
    assert printed("--recipe", recipe)["--fp8-recipe"] == ["full", f"recipe {recipe}"]
    found = printed("--recipe", recipe, "--precision", "fp32")
    assert found["--fp8-recipe"][1] == found["--fp8-skip"][1] == "default"


def test_a_run_keeps_a_list_of_its_options(shards, tmp_path, capsys, printed):
    (tmp_path / "mine.toml").write_text(f'model = "{TINY}"\nbatch_size = 8\nepochs = 1\nwarmup = "auto"\nworkers = 0')
    options = ["--train-data", shards, "--logs", tmp_path, "--name", "run"]
    output_of(capsys, "train", "--recipe", tmp_path / "mine.toml", *options)
    origin, again = f"recipe {tmp_path}/mine.toml", ["--resume", tmp_path / "run"]
    found = printed(*again, "--epochs", 2)
    assert found["--epochs"] == ["2", "flag"]
    assert found["--batch-size"] == ["8", f"checkpoint {tmp_path}/run/checkpoints/epoch_latest.pt"]
    # the global batch size takes precedence over the batch size of each process, which is unchanged
    other = printed(*again, "--global-batch-size", 16)
    assert (other["--batch-size"], other["--global-batch-size"]) == (found["--batch-size"], ["16", "flag"])
    found = rows((tmp_path / "run" / "params.txt").read_text())
    assert [found[flag] for flag in ("--warmup", "--epochs", "--name")] == [
        ["auto", origin],
        ["1", origin],
        ["run", "flag"],
    ]
