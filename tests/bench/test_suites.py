"""Test the suites of benchmarks: their inputs, the comparison of a training step, its FLOPs, and the record of the
machine.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipfast import get_model_config, host
from clipfast.bench import checkout, harness
from clipfast.bench.case import Candidate, call
from clipfast.bench.suites import SUITES, build
from clipfast.bench.suites.step import forward_flops, step_floor_flops, step_flops
from clipfast.kernels.spec import specs

from .conftest import CPU, grad_twice


def judged(case, *candidates):
    """Return the timings of candidates after the gate, which refuses those with wrong results."""
    timings = [harness.Timing(candidate) for candidate in candidates]
    harness.pass_gate(case, timings)
    return timings


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        (lambda image, text, scale: (image.roll(1, 0), text.roll(1, 0), scale), "image"),
        (lambda image, text, scale: (grad_twice(image), text, scale), "d_parameters"),
    ],
    ids=["features", "gradients"],
)
def test_a_step_is_held_to_features_and_gradients_not_to_the_loss_alone(fault, wrong):
    built = build("step", {"model": "ViT-T-8-32", "batch": 3}, "fp32", CPU)

    def make():
        """Make the benchmark's training step with a fault in the outputs of the model."""
        step = built.ours.make()
        model = step.model
        step.model = lambda images, texts: fault(*model(images, texts)[:3])
        return step

    right, faulty = judged(built, built.ours, Candidate("faulty", make))
    assert right.refused is None
    assert faulty.errors["value"] < 1e-4  # the loss alone would not show the fault
    assert f"wrong: {wrong} is off by" in faulty.refused


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [(lambda y, s: (y, 1.1 * s), "value_2"), (lambda y, s: (grad_twice(y), s), "d_x")],
    ids=["second", "gradient"],
)
def test_all_results_of_an_op_are_held_to_the_reference(fault, wrong):
    built = build("layer_norm", SUITES["layer_norm"].smallest | {"residual": True}, "fp32", CPU)
    right = built.ours.make()
    faulty = Candidate("faulty", lambda: lambda **inputs: fault(*right(**inputs)))
    (timing,) = judged(built, faulty)
    assert f"wrong: {wrong} is off by" in timing.refused


@pytest.mark.parametrize("bias", [False, True])
def test_peers_of_attention_take_a_projection_with_and_without_a_bias(bias):
    built = build("attention", SUITES["attention"].smallest | {"causal": True, "bias": bias}, "fp32", CPU)
    wanted = [one for one in built.candidates if one.name in (built.ours.name, "SDPA flash", "SDPA math")]
    inputs = harness.leaves(built, built.inputs())
    ours, flash, math = (call(built, one, one.make(), inputs) for one in wanted)
    torch.testing.assert_close(flash, ours)
    torch.testing.assert_close(math, ours)


def test_commit_of_a_copy_without_its_history(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_COMMIT", "abc123")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert host.commit(tmp_path) == {"sha": "abc123", "dirty": None}
    assert host.commit(checkout.ROOT)["sha"] != "abc123"


def test_every_op_is_measured_at_published_sizes():
    for name, spec in specs().items():
        assert SUITES[spec.suite_name].op is spec
        for device_type in ("cpu", "cuda"):
            # attention_qkv has the same kernels as attention, so it needs no benchmark of its own.
            assert spec.bench[device_type] or name == "attention_qkv"
            assert all(spec.floor(shape, 2, False).bytes > 0 for shape in spec.bench[device_type])


@pytest.mark.parametrize("name", ["ViT-T-8-32", "ViT-g-14", "RN50"])
def test_count_agrees_with_what_open_clip_computes(name):
    open_clip = pytest.importorskip("open_clip")
    config = get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config.to_dict())
        size = config.vision.image_size
        image, text = torch.empty(1, 3, size, size), torch.empty(1, config.text.context_length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(image)
        model.encode_text(text)
    assert forward_flops(name) == (pytest.approx(counter.get_total_flops(), rel=0.001), config.embed_dim)


def test_a_step_is_three_forwards_and_the_loss():
    # OpenCLIP's table of models gives 14.8 GFLOP for a pair.
    flops, _ = forward_flops("ViT-B-32")
    assert flops == pytest.approx(14.78e9, rel=0.001)
    assert step_flops("ViT-B-32", 8) == 24 * flops + 6 * 64 * 512
    assert step_floor_flops("ViT-B-32", 8) == 24 * flops + 8 * 64 * 512


def test_no_mode_of_a_strip_is_timed_on_uninitialised_rows(poison):
    case = build("strips", SUITES["strips"].smallest, "fp32", CPU)
    inputs = case.inputs()
    for candidate in case.candidates[:-1]:
        for name, value in call(case, candidate, candidate.make(), inputs).items():
            assert value.isfinite().all(), (candidate.name, name)
