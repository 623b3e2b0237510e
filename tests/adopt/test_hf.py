"""CLIP, SigLIP and SigLIP 2 of transformers compute the same before and after they are patched."""

import copy
from unittest import mock

import pytest
import torch

from clipfast.adopt import hf
from clipfast.models import layers

from . import hf_models
from .pairs import HF_NAMES, TRAINING, assert_equal, assert_equal_results, lines, pair

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", hf_models.PAIRS)
def test_pairs(name):
    model, patched = pair(name)
    for padding in (None, "nowhere", "end", "early", "start", "middle"):
        assert_equal(model, patched, given=hf_models.inputs(model, padding))
    assert_equal(model.float(), patched.float(), 1e-5)


@pytest.mark.parametrize("name", hf_models.TOWERS)
def test_towers(name):
    model, patched = pair(name)
    for padding in (None, "end", "start"):
        assert_equal_results(model, patched, given=hf_models.inputs(model, padding))
    rows = lines(patched, "pooled_last_block")
    assert rows
    assert all("as before: every row of its last block is" in line for line in rows)


@pytest.mark.parametrize("name", HF_NAMES)
def test_one_pair_and_short_texts(name):
    model, patched = pair(name)
    for padding in ("end", None):
        given = hf_models.inputs(model, padding, batch=1)
        short = {key: x[:, :4] if key in ("input_ids", "attention_mask") else x for key, x in given.items()}
        for each in (given, short):
            assert_equal_results(model, patched, given=each)
            ours, theirs = (hf_models.results(one, each, **TRAINING) for one in (patched, model))
            # the contrastive loss of one pair is zero, and so are its gradients
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def called(model: torch.nn.Module, given: dict, **options: object) -> tuple[int, int]:
    """Return how often a patched model calls clipfast's attention for all rows, and for one row."""
    with (
        mock.patch.object(hf, "attention_qkv", wraps=hf.attention_qkv) as whole,
        mock.patch.object(layers, "single_query_attention", wraps=layers.single_query_attention) as row,
    ):
        model(**given, **options)
    return whole.call_count, row.call_count


@pytest.mark.parametrize("name", HF_NAMES)
def test_what_runs_on_ours(name):
    """Both blocks of each tower run on clipfast's attention, the last one maybe for one row, if padding allows it."""
    _, patched = pair(name)
    for paddings, forward, in_training in (
        ((None, "nowhere", "end"), (4, 0), (2, 2) if name == "clip" else (3, 1)),
        (("start", "middle"), (2, 0), (1, 1) if name == "clip" else (2, 0)),
    ):
        for padding in paddings:
            given = hf_models.inputs(patched, padding)
            assert called(patched, given) == forward
            assert called(patched, given, return_loss=True) == in_training
    assert called(patched.eval(), hf_models.inputs(patched), return_loss=True) == (4, 0)


def outputs_of(given, *models, **options):
    """Return the outputs of several models of transformers, patched or not, for the same inputs."""
    return [hf_models.flat(each(**given, return_loss=True, **options)) for each in models]


def test_a_call_for_rows_gets_them():
    model, patched = pair("clip")
    given = hf_models.inputs(model, "end")
    assert patched(**given, return_loss=True).text_model_output.last_hidden_state is None
    for options, is_wanted in (
        ({"output_hidden_states": True}, lambda key: "logits" not in key and not key.startswith(".vision")),
        ({"return_dict": False}, lambda key: True),
        ({"interpolate_pos_encoding": True}, lambda key: key == ".loss"),
    ):
        ours, theirs = ({key: x for key, x in outputs.items() if is_wanted(key)} for outputs in
                        outputs_of(given, patched, model, **options))  # fmt: skip
        torch.testing.assert_close({key: ours[key] for key in theirs}, theirs, rtol=0, atol=1e-10)
    for each in (model, patched):
        each.text_model.config.output_hidden_states = True
    ours, theirs = outputs_of(given, patched, model)
    rows = [key for key in theirs if key.startswith(".text_model_output") and "hidden_state" in key]
    assert len(rows) > 1
    torch.testing.assert_close({key: ours[key] for key in rows}, {key: theirs[key] for key in rows}, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_another_implementation_later(name):
    model, patched = pair(name)
    given = hf_models.inputs(model, "end")
    for each in (model, patched):
        each.set_attn_implementation("eager")
    assert called(patched, given) == (0, 0)
    assert_equal(model, patched, given=given)
    assert all("as before" in line for line in lines(patched, "attention") if "self_attn" in line)
    patched.set_attn_implementation("sdpa")
    assert called(patched, given) == (4, 0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_flash_attention_without_padding_is_ours(name):
    # transformers' own flash attention would fail here, since it needs a GPU.
    model, patched = pair(name)
    given = hf_models.inputs(model)
    for tower in (patched.text_model, patched.vision_model):
        tower.config._attn_implementation = "flash_attention_2"
    assert called(patched, given) == (4, 0)
    assert_equal_results(model, patched, given=given)


def test_dropout_is_reported():
    model, patched = pair("clip with dropout")
    given = hf_models.inputs(model, "end")
    assert called(patched, given) == (0, 0)
    assert all("in evaluation, since it drops" in line for line in lines(patched, "attention") if "self_attn" in line)
    assert called(patched.eval(), given) == (4, 0)
    assert_equal_results(model.eval(), patched, given=given)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_other_arguments(name):
    model, patched = pair(name)
    given = hf_models.inputs(model)
    length = given["input_ids"].shape[1]
    side = given["pixel_values"].shape[-1]
    texts = {"input_ids": given["input_ids"]}
    wide = {**given, "pixel_values": torch.randn(3, 3, 2 * side, side, dtype=torch.float64)}
    bias = torch.randn(1, 1, length, length, dtype=torch.float64)
    assert_equal_results(model.text_model, patched.text_model, given=texts, position_bias=bias)
    for each, options in (
        (given, {"position_ids": torch.arange(length).flip(0)[None]}),
        (given, {"attention_mask": torch.ones(3, 1, length, length, dtype=torch.bool).tril(1)}),
        # one mask, [1, 1, length, length], for all sequences
        (given, {"attention_mask": torch.ones(1, 1, length, length, dtype=torch.bool).tril()}),
        (wide, {"interpolate_pos_encoding": True}),
        (given, {"interpolate_pos_encoding": True}),
    ):
        assert_equal(model, patched, given=each, **options)


@pytest.mark.parametrize("name", HF_NAMES)
@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
def test_sixteen_bits(name, mode):
    """In 16 bits, a patched model is as near to float64 as the original, and has outputs of the same dtypes."""
    model, patched = pair(name, torch.float32 if mode == "autocast" else torch.bfloat16)
    exact = copy.deepcopy(model).double()
    for padding in (None, "end"):
        given = hf_models.inputs(model, padding)
        truth = hf_models.flat(exact(**given | {"pixel_values": given["pixel_values"].double()}))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            ours, theirs = (hf_models.flat(each(**given)) for each in (patched, model))
            losses = [each(**given, return_loss=True).loss for each in (patched, model)]
        for key, x in theirs.items():
            assert ours[key].dtype == x.dtype, key
            errors = [float((each[key].double() - truth[key]).abs().max()) for each in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-6, key
        torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=0.05, atol=0.05)
        losses[0].backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in patched.parameters())
