"""Patched towers: embeddings of patches and texts, and last blocks that compute only the row that is pooled."""

import copy
import re

import pytest
import torch
from torch import nn

from . import shrunk
from .pairs import HF_PARTS, PARTS, assert_equal, lines, pair, patch


@pytest.mark.parametrize("part", HF_PARTS)
@pytest.mark.parametrize("name", ["ViT-B-32", "clip", "siglip"])
def test_one_part_alone(name, part):
    rows = {"attention", "loss", "pooled_last_block"}
    needed = {"pooled_last_block": rows, "pack_text": rows | {"pack_text"}}.get(part, {part})
    parts = PARTS if name == "ViT-B-32" else HF_PARTS
    model, patched = pair(name, **{other: other in needed for other in parts})
    assert_equal(model, patched)
    for other in parts:
        assert all((f"{other}=False" in line) != (other in needed) for line in lines(patched, other))


@pytest.mark.parametrize("prob", [0.5, 0.99])
def test_patch_dropout_draws_the_same_patches(prob):
    model, patched = configured("vision_cfg", patch_dropout=prob)
    assert_equal(model, patched)
    assert_equal(model.eval(), patched.eval())
    # A hook on patch_dropout must see all patches.
    for each in (model, patched):
        each.train().visual.patch_dropout.register_forward_hook(lambda module, args, output: 2 * output)
    assert_equal(model, patched)


def configured(part, kind="CLIP", **changes):
    """Make an OpenCLIP model with ``changes`` in the section ``part`` of its configuration, and a patched copy."""
    import open_clip

    config = shrunk.shrink(open_clip.get_model_config("ViT-B-32"))
    config[part].update(changes)
    model = shrunk.randomised(getattr(open_clip, kind)(**config)).double()
    return model, patch(copy.deepcopy(model))


def test_bytes_are_normalised():
    model, patched = pair("ViT-B-32")
    images = torch.randint(0, 256, shrunk.inputs(model)[0].shape, dtype=torch.uint8)
    # OpenCLIP raises its own error, since the model does not know the mean of the pixels.
    with pytest.raises(RuntimeError):
        patched.encode_image(images)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    patched.visual.image_mean, patched.visual.image_std = mean, std
    torchvision = pytest.importorskip("torchvision")
    normal = torchvision.transforms.functional.normalize(images.double() / 255, mean, std)
    torch.testing.assert_close(patched.encode_image(images), model.encode_image(normal), rtol=1e-6, atol=1e-7)


def test_other_sizes_are_refused_as_before():
    model, patched = pair("ViT-B-32")
    for size in (95, 64, 128):
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        with pytest.raises(RuntimeError) as theirs:
            model.encode_image(images)
        with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
            patched.encode_image(images)


@pytest.mark.parametrize("pool_type", ["first", "last", "argmax", "eos", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_rows_of_texts(pool_type, causal, kind):
    changes = {"pool_type": pool_type, "no_causal_mask": not causal, "eos_id": shrunk.VOCABULARY - 1}
    model, patched = configured("text_cfg", kind, **changes)
    assert_equal(model, patched)
    text = lines(patched, "pooled_last_block")[kind != "CLIP"]
    assert ("every row" in text) == (pool_type == "none")


@pytest.mark.parametrize("where", ["resblocks.2", "resblocks.2.attn", "resblocks.2.mlp.gelu", "resblocks.2.ln_1"])
def test_a_hook_in_the_last_block_sees_every_row(where):
    model, patched = pair("ViT-B-32")
    seen = []
    for each in (model, patched):
        module = each.visual.transformer.get_submodule(where)
        module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert_equal(model, patched)
    assert len(set(seen)) == 1
    assert "as before: its last block has a hook" in lines(patched, "pooled_last_block")[1]


def test_a_replaced_part_of_the_last_block_sees_every_row():
    model, patched = pair("ViT-B-32")
    for each in (model, patched):
        block = each.visual.transformer.resblocks[-1]
        block.ls_2 = nn.BatchNorm1d(10, dtype=torch.float64)  # BatchNorm mixes the rows of its input
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)
        each.visual.transformer.get_cast_dtype = lambda: torch.float64
    assert_equal(model, patched)
    assert "as before: its last block has parts that CLIP's has not" in lines(patched, "pooled_last_block")[1]
    (mlp,) = [line for line in lines(patched, "activations") if line.startswith("visual") and "as before:" in line]
    assert "not linear" in mlp


def test_what_towers_keep():
    model, patched = pair("ViT-B-32")
    images, texts = shrunk.inputs(model)

    def check(compute):
        """Check that a tower of OpenCLIP returns the same before and after it is patched."""
        torch.testing.assert_close(compute(patched), compute(model), rtol=0, atol=1e-12)

    check(lambda each: each.encode_image(images, normalize=True))
    check(lambda each: each.encode_text(texts, normalize=True))
    for each in (model, patched):
        each.visual.output_tokens = True
    check(lambda each: each.visual(images))
    for each in (model, patched):
        each.visual.prune_intermediate_layers(1)
        each.visual.output_tokens = False
    check(lambda each: each.visual(images))
