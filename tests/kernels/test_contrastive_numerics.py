"""The contrastive losses against float64, at every promised size and scale, at the start and at the end of training."""

import functools

import pytest
import torch
import torch.nn.functional as F

from clipfast import kernels
from clipfast.kernels import contrastive_loss, launch, reference

from ..conftest import INTERPRET, LEG, ON_GPU
from ..numerics import value_and_grads
from .conftest import loss_inputs

PAIRS = (1, 2, 3, 127, 129)
DIMS = (8, 64, 512, 520, 640, 768, 1024, 1280)
# Each stage of training has a scale, and the standard deviations by which the cosine of a pair exceeds that of chance.
# In the last stage the scale is that of a trained model, but the features are not.
STAGES = {"start": (14.3, 0.0), "middle": (50.0, 2.0), "end": (100.0, 3.5), "new at 100": (100.0, 0.0)}
ONE = torch.tensor(1.0)


def features(pairs, embed_dim, stage, dtype, device):
    scale, deviations = STAGES[stage]
    # With few pairs, a trained model makes so few mistakes that even float64 could not tell how few.
    cosine = min(0.8, deviations * (1.0 if pairs > 3 else 0.3) / embed_dim**0.5)
    matched = cosine / (cosine + (1 - cosine**2) ** 0.5)
    return scale, loss_inputs((pairs, embed_dim), dtype, device, matched=matched, scale=scale)


def errors(ours, truth):
    """Return the relative error of each result, and the worst relative error of a row that is not tiny."""
    found = {}
    for name, value in ours.items():
        difference = value.double() - truth[name]
        size = truth[name].norm()
        found[name] = (difference.norm() / size).item() if size > 0 else difference.norm().item()
        if value.ndim == 2 and size > 0:
            rows = truth[name].norm(dim=1)
            kept = rows > 1e-3 * rows.max()
            found[f"{name} row"] = (difference.norm(dim=1) / rows)[kept].max().item()
    return found


def measured(inputs):
    ours = value_and_grads(contrastive_loss, inputs, ONE)
    again = value_and_grads(contrastive_loss, inputs, ONE)
    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    truth = value_and_grads(reference.contrastive_loss, {name: x.double() for name, x in inputs.items()}, ONE)
    return errors(ours, truth)


def held(found, limits):
    over = {name: error for name, error in found.items() if not error <= limits[name]}
    assert not over, f"{over}, allowed {limits}"


def limits(names, pairs, scale, gradient):
    # In float32 a logit of 100 has an error of up to 6e-6. It averages out over many pairs, but not over a few.
    known = {"value": 1e-6 if pairs > 100 else 1e-6 * scale, "d_logit_scale": 1e-4, "d_logit_bias": 1e-4}
    return {name: known.get(name, 8 * gradient if name.endswith(" row") else gradient) for name in names}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("embed_dim", DIMS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_float32(pairs, embed_dim, stage, device):
    scale, inputs = features(pairs, embed_dim, stage, torch.float32, device)
    found = measured(inputs)
    held(found, limits(found, pairs, scale, 1e-4))


@pytest.mark.skipif(LEG == "interpreter", reason="large: the interpreter would take minutes")
@pytest.mark.parametrize(
    ("embed_dim", "stage"), [(d, s) for d in DIMS for s in STAGES if d == 512 or s == list(STAGES)[d % 3]]
)
def test_many_pairs(embed_dim, stage, device):
    # several chunks of rows, the last one short; 4099 pairs are a case of the specification
    scale, inputs = features(2053, embed_dim, stage, torch.float32, device)
    found = measured(inputs)
    held(found, limits(found, 2053, scale, 1e-5 if stage == "start" else 1e-4))


def call(name, inputs):
    """Return a loss, its reference, and the features by the names of its arguments."""
    image, text, scale = inputs.values()
    negatives = F.normalize(torch.randn(150, image.shape[1], device=image.device), dim=-1)
    options, inputs = {
        "contrastive_loss": ({}, inputs),
        "sigmoid_loss": ({}, {**inputs, "logit_bias": torch.tensor(-10.0, device=image.device)}),
        "info_nce_loss": ({}, {"query": image, "key": text, "negatives": negatives, "logit_scale": scale}),
        "nt_xent_loss": ({"normalize": False}, {"first": image, "second": text, "logit_scale": scale}),
    }[name]
    return *(functools.partial(getattr(module, name), **options) for module in (kernels, reference)), inputs


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arch", [80, 90] if INTERPRET else [0])
@pytest.mark.parametrize("pairs", [127, 129])
@pytest.mark.parametrize("loss", ["contrastive_loss", "sigmoid_loss", "info_nce_loss", "nt_xent_loss"])
def test_16_bit_operands(loss, pairs, arch, stage, device, monkeypatch):
    # The features are float32, but their values fit 16 bits. Under autocast the operands then have 16 bits, while the
    # gradients are returned in float32, before they are rounded. The interpreter has no bfloat16; float16 takes the
    # same way through the kernels.
    monkeypatch.setattr(launch, "CPU_ARCH", arch or 80)
    dtype = torch.float16 if INTERPRET else torch.bfloat16
    scale, inputs = features(pairs, 64, stage, torch.float32, device)
    op, expected, inputs = call(loss, inputs)
    inputs = {name: x.to(dtype).float() if x.ndim else x for name, x in inputs.items()}
    truth = value_and_grads(expected, {name: x.double() for name, x in inputs.items()}, ONE)
    with torch.autocast("cuda" if ON_GPU else "cpu", dtype):
        ours = value_and_grads(op, inputs, ONE)
    first = f"d_{next(iter(inputs))}"
    assert ours[first].dtype == torch.float32
    found = errors(ours, truth)
    # float16 rounds 8 times as finely as the bfloat16 that it stands for
    scalar = 1e-4 / (8 if INTERPRET else 1)
    held(found, limits(found, pairs, scale, 6e-4) | {"d_logit_scale": scalar, "d_logit_bias": scalar})
    if LEG != "cpu":
        # The rounding of G to 16 bits must show. Otherwise this was not the kernels' path.
        assert found[first] > 1e-6
