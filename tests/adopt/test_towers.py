"""Embeddings, and last blocks that compute one row only."""

import copy

import pytest
import torch
from torch import nn

import clipfast

from . import shrunk

PARTS = ["attention", "norms", "activations", "patch_embed", "text_embed", "pooled_last_block"]


def pair(name: str = "ViT-B-32", **flags: bool) -> tuple[nn.Module, nn.Module]:
    """A model, and a patched copy."""
    model = shrunk.open_clip_model(name).double()
    return model, clipfast.apply_to_open_clip(copy.deepcopy(model), **flags)


def assert_equal(model: nn.Module, patched: nn.Module) -> None:
    """Both compute the same."""
    args = shrunk.inputs(model)
    error, where = shrunk.largest_error(shrunk.results(patched, *args), shrunk.results(model, *args))
    assert error <= 1e-10, where


def lines(model: nn.Module, part: str) -> list[str]:
    """The lines of the report on one part."""
    return [line for line in clipfast.report(model).splitlines() if line.split()[2] == part]


@pytest.mark.parametrize("on", [[part] for part in PARTS[:-1]] + [["attention", "pooled_last_block"]])
def test_one_part_alone(on):
    model, patched = pair(**{part: part in on for part in PARTS})
    assert_equal(model, patched)
    for part in PARTS:
        assert all((f"{part}=False" in line) != (part in on) for line in lines(patched, part))


def test_a_row_needs_our_attention():
    model, patched = pair(attention=False)
    assert_equal(model, patched)
    assert all("as before: its attention is not ours" in line for line in lines(patched, "pooled_last_block"))


@pytest.mark.parametrize("prob", [0.5, 0.99])
def test_patch_dropout_draws_the_same_patches(prob):
    import open_clip

    config = shrunk.shrink(open_clip.get_model_config("ViT-B-32"))
    config["vision_cfg"]["patch_dropout"] = prob
    model = shrunk.randomised(open_clip.CLIP(**config)).double()
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    assert_equal(model, patched)
    assert_equal(model.eval(), patched.eval())
    # a hook on the dropout must see all patches
    for each in (model, patched):
        each.train().visual.patch_dropout.register_forward_hook(lambda module, args, output: 2 * output)
    assert_equal(model, patched)


def test_bytes_are_normalised():
    model, patched = pair()
    images = torch.randint(0, 256, shrunk.inputs(model)[0].shape, dtype=torch.uint8)
    with pytest.raises(RuntimeError):  # theirs: neither knows its mean
        patched.encode_image(images)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    patched.visual.image_mean, patched.visual.image_std = mean, std
    normal = (images.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]
    torch.testing.assert_close(patched.encode_image(images), model.encode_image(normal), rtol=1e-6, atol=1e-7)


def test_other_sizes_are_refused_as_before():
    model, patched = pair()
    for size in (95, 64, 128):
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        outcomes = []
        for each in (model, patched):
            try:
                outcomes.append(each.encode_image(images))
            except RuntimeError as error:
                outcomes.append(str(error))
        if isinstance(outcomes[0], str):
            assert outcomes[0] == outcomes[1]
        else:
            torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pool_type", ["first", "last", "argmax", "eos", "none"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("custom", [True, False])
def test_rows_of_texts(pool_type, causal, custom):
    import open_clip

    config = shrunk.shrink(open_clip.get_model_config("ViT-B-32"))
    config["text_cfg"].update(pool_type=pool_type, no_causal_mask=not causal, eos_id=shrunk.VOCABULARY - 1)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = shrunk.randomised(kind(**config)).double()
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    assert_equal(model, patched)
    text = lines(patched, "pooled_last_block")[0 if not custom else 1]
    assert ("every row" in text) == (pool_type == "none")


@pytest.mark.parametrize("where", ["resblocks.2", "resblocks.2.attn", "resblocks.2.mlp.gelu", "resblocks.2.ln_1"])
def test_a_hook_in_the_last_block_sees_every_row(where):
    model, patched = pair()
    seen = []
    for each in (model, patched):
        module = each.visual.transformer.get_submodule(where)
        module.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    assert_equal(model, patched)
    assert len(set(seen)) == 1
    assert "as before: its last block has a hook" in lines(patched, "pooled_last_block")[1]


def test_a_replaced_part_of_the_last_block_sees_every_row():
    model, patched = pair()
    for each in (model, patched):
        block = each.visual.transformer.resblocks[-1]
        block.ls_2 = nn.BatchNorm1d(10, dtype=torch.float64)  # mixes what it is given
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)
        each.visual.transformer.get_cast_dtype = lambda: torch.float64
    assert_equal(model, patched)
    assert "as before: its last block has parts that CLIP's has not" in lines(patched, "pooled_last_block")[1]
    (mlp,) = [line for line in lines(patched, "activations") if line.startswith("visual") and "as before:" in line]
    assert "the layer before the activation is not linear" in mlp


def test_what_towers_keep():
    model, patched = pair()
    for each in (model, patched):
        each.set_grad_checkpointing()
    assert_equal(model, patched)
    args = shrunk.inputs(model)
    for name in ("encode_image", "encode_text"):
        ours, theirs = (getattr(each, name)(args[name == "encode_text"], normalize=True) for each in (patched, model))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for each in (model, patched):
        each.visual.output_tokens = True
    for ours, theirs in zip(patched.visual(args[0]), model.visual(args[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for each in (model, patched):
        each.visual.prune_intermediate_layers(1)
        each.visual.output_tokens = False
    torch.testing.assert_close(patched.visual(args[0]), model.visual(args[0]), rtol=0, atol=1e-12)


def test_autocast_keeps_the_dtypes_of_streams():
    model = shrunk.open_clip_model("ViT-B-32")
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    dtypes: dict[str, list[torch.dtype]] = {}
    for name, each in (("ours", patched), ("theirs", model)):
        for stack in (each.transformer, each.visual.transformer):
            first = stack.resblocks[0]
            first.register_forward_pre_hook(
                lambda module, args, name=name: dtypes.setdefault(name, []).append(args[0].dtype)
            )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in (patched, model):
            each(*shrunk.inputs(model))
    assert dtypes["ours"] == dtypes["theirs"]
