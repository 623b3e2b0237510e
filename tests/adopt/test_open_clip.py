"""OpenCLIP's models compute the same before and after they are patched."""

import copy
import inspect
from unittest import mock

import pytest
import torch

import clipfast
from clipfast.bench.adoption import table

from ..models.test_transformer import Operations
from . import shrunk
from .pairs import assert_equal, pair

# One configuration of each kind of model; the others differ in size only (--slow goes through them all).
KINDS = [
    "ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14-CLIPA", "ViT-L-14-worldwide", "RN50", "coca_ViT-B-32", "coca_base",
    "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-SO400M-14-SigLIP", "convnext_base", "PE-Core-B-16", "EVA02-B-16",
    "EVA01-g-14", "MobileCLIP2-S0", "MobileCLIP-S1", "swin_base_patch4_window7_224",
    "vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224", "ViT-S-32-alt",
]  # fmt: skip


def compare(model: torch.nn.Module, limit: float) -> str:
    """Compare a patched copy of an OpenCLIP model with the original, and return the copy's report of kernels."""
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    assert list(model.state_dict()) == list(patched.state_dict())
    assert_equal(model, patched, limit)
    return clipfast.report_kernels(patched)


@pytest.mark.parametrize("name", KINDS)
def test_equal_in_float64(name):
    compare(shrunk.open_clip_model(name).double(), 1e-10)


@pytest.mark.parametrize("place", ["as_on_a_gpu", "as_on_a_cpu"])
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP"])
def test_equal_in_float32(name, place, request):
    request.getfixturevalue(place)
    compare(shrunk.open_clip_model(name).eval(), 1e-5)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast", "float64"])
def test_what_a_cpu_runs(mode, as_on_a_cpu):
    """On a CPU, a patched model runs clipfast's kernels only where they are faster."""
    model = clipfast.apply_to_open_clip(shrunk.open_clip_model("ViT-B-32"))
    assert "clipfast.attention, causal (on a CPU as before)" in clipfast.report_kernels(model)
    model = model.to(torch.float32 if mode == "autocast" else getattr(torch, mode))
    images, texts = shrunk.inputs(model)
    with Operations() as ops:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            outputs = model(images.to(model.visual.conv1.weight.dtype), texts)
        sum(x.float().sum() for x in outputs).backward()
    # The op "attention" is called for packed texts.
    ways = [f"{op}_{way}" for op in ("attention", "attention_pool", "patch_embed") for way in ("fwd", "bwd")]
    faster = {f"clipfast.{way}.default" for way in ways}
    names = {name for name in ops.counts if name.startswith("clipfast.")}
    assert (names > faster) if mode == "float64" else (names == faster), names


@pytest.mark.parametrize("options", [
    {"qk_norm": True}, {"scale_heads": True, "scale_attn_inner": True}, {"scale_attn": True, "scale_fc": True},
    {"ls_init_value": 0.5},
])  # fmt: skip
def test_blocks_with_options(options):
    import open_clip

    config = shrunk.shrink(open_clip.get_model_config("ViT-B-32"))
    config["vision_cfg"].update(options)
    config["text_cfg"].update(options)
    report = compare(shrunk.randomised(open_clip.CLIP(**config)).double(), 1e-10)
    assert "attn" not in [line.split()[0].split(".")[-1] for line in report.splitlines() if "as before:" in line]


@pytest.mark.parametrize("place", ["as_on_a_gpu", "as_on_a_cpu"])
def test_autocast_and_sixteen_bits(place, packed, request):
    request.getfixturevalue(place)
    model, patched = pair("ViT-B-32", torch.float32)
    args = shrunk.inputs(model)
    truth = shrunk.results(model, *args)

    def check(truth, *args):
        """Check that a patched OpenCLIP model returns the original's dtypes, and errs at most 1.5 times as much."""
        ours, theirs = shrunk.results(patched, *args), shrunk.results(model, *args)
        assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
        assert shrunk.largest_error(ours, truth)[0] <= 1.5 * shrunk.largest_error(theirs, truth)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(truth, *args)
    for each in (patched, model):
        each.bfloat16()
    check({name: x.bfloat16() for name, x in truth.items()}, args[0].bfloat16(), args[1])
    assert packed == [True, True]


def test_masks():
    model, patched = pair("ViT-B-32")
    assert "clipfast.attention, causal" in clipfast.report_kernels(patched)

    def check(compute):
        """Check that a masked layer of OpenCLIP returns the same before and after it is patched."""
        torch.testing.assert_close(compute(patched), compute(model), rtol=0, atol=1e-12)

    x = torch.randn(2, 77, 48, dtype=torch.float64)
    other = torch.zeros(77, 77, dtype=torch.float64).masked_fill(torch.rand(77, 77) < 0.3, float("-inf"))
    for mask in (None, other, model.attn_mask):  # masks other than the patched model's own, which is causal
        check(lambda each, mask=mask: each.transformer(x, mask))
    texts = shrunk.inputs(model)[1]
    for change in (lambda each: setattr(each, "attn_mask", other), lambda each: each.attn_mask.mul_(1).fill_(0)):
        for each in (model, patched):
            change(each)
        for _ in range(2):
            check(lambda each: each.encode_text(texts))
    assert "its mask is not the causal one" in clipfast.report_kernels(patched)
    assert "its mask is not the causal one" in compare(model, 1e-10)
    model.attn_mask = None
    assert "causal" not in compare(model, 1e-10)


def test_a_later_version_with_another_argument(monkeypatch):
    import open_clip

    kind = open_clip.transformer.ResidualAttentionBlock
    theirs = kind.forward

    def forward(self, x, *args, factor=1.0, **options):
        """Compute attention as a later OpenCLIP might, with an argument that clipfast does not know."""
        return factor * theirs(self, x, *args, **options)

    parameters = list(inspect.signature(theirs).parameters.values())
    later = inspect.Parameter("factor", inspect.Parameter.KEYWORD_ONLY, default=1.0)
    forward.__signature__ = inspect.Signature([*parameters, later])
    monkeypatch.setattr(kind, "forward", forward)
    model = shrunk.randomised(kind(48, 2)).double()
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    assert "as before: in this version of its library, its forward takes factor too" in clipfast.report_kernels(patched)
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(patched(x, factor=2.0), model(x, factor=2.0), rtol=0, atol=1e-12)


def test_a_decoders_slices_of_its_mask_are_causal():
    model = clipfast.apply_to_open_clip(shrunk.open_clip_model("coca_ViT-B-32").eval())
    args, kind = shrunk.inputs(model), torch.nn.MultiheadAttention
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward) as theirs:
            model(*args)
        # Only the unimodal text tower may call PyTorch's attention, since its mask hides padding, too.
        assert {call.args[0] for call in theirs.call_args_list} <= {
            block.attn for block in model.text.transformer.resblocks
        }


@pytest.mark.slow
def test_every_configuration():
    library = table.LIBRARIES[0]
    for name in library.names():
        table.measure(library, name)  # measure raises ValueError if a model's error exceeds its limit
