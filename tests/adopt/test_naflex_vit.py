"""A patched NaFlexVit of timm, which packs images, has the features and gradients of timm's with padded images."""

import copy

import pytest
import torch
from torch import nn

import clipfast
from clipfast.adopt import naflex_vit as adopted
from clipfast.models.packed_images import unpad_images

from ..models.naflex import MOST, PATCH, mixes, naflex_vit, padded
from . import shrunk
from .pairs import error, lines, replacements

naflexvit = pytest.importorskip("timm.models.naflexvit", reason="this timm has no NaFlexViT")

KINDS = {
    "siglip": {"act_layer": "gelu_tanh", "global_pool": "map", "pos_embed_interp_mode": "bilinear"},
    "registers": {"global_pool": "map", "reg_tokens": 3},
    "gap": {"global_pool": "avg", "reg_tokens": 2, "init_values": 0.5},
    "token": {"global_pool": "token", "class_token": True, "reg_tokens": 1, "fc_norm": False, "pre_norm": True},
    "aspect": {"global_pool": "avg", "pos_embed_ar_preserving": True, "pool_include_prefix": True, "class_token": True},
    "factorized": {"global_pool": "avg", "pos_embed": "factorized"},
}


def made(kind="gap", **changes):
    """Return a small NaFlexVit of timm with random weights, in float64."""
    torch.manual_seed(0)
    return shrunk.randomised(naflex_vit(6, **KINDS[kind] | changes)).double()


def pair(kind="gap", **options):
    """Return a small NaFlexVit of timm, and a copy of it that was patched to run on clipfast's ops."""
    tower = made(kind)
    return tower, clipfast.apply_to_timm(copy.deepcopy(tower), **options)


def batches(count, patch=PATCH):
    """Yield padded batches of images of random sizes for timm's NaFlexVit."""
    return (padded(images, patch) for images in mixes(count, patch))


def results(tower, batch):
    """Return the features of a batch, and the gradients of a sum of them with respect to parameters and patches."""
    tower.zero_grad()
    patches = batch["patches"].clone().requires_grad_()
    features = tower({**batch, "patches": patches})
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (features * weights.to(features.dtype)).sum().backward()
    return {"features": features.detach(), "patches": patches.grad} | {
        n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None
    }


@pytest.fixture
def packed(monkeypatch):
    """Return a list that records, for each batch that may be packed, whether clipfast's op embeds it."""
    seen, find = [], adopted._images

    def images(tower, batch):
        """Return a batch as packed images or None, and record whether clipfast's op embeds it."""
        found = find(tower, batch)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(adopted, "_images", images)
    return seen


@pytest.fixture
def in_double(monkeypatch):
    """Let timm resize position embeddings in float64; by itself, it would round them to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_changes_nothing(kind, packed, in_double):
    tower, patched = pair(kind)
    assert "as before" not in lines(patched, "pack_image")[0]
    for batch in batches(20):
        assert error(results(patched, batch), results(tower, batch)) <= 1e-12
    assert packed == 20 * [kind != "factorized"]


@pytest.mark.parametrize("kind", ["siglip", "gap"])
def test_layers_of_timm_embed_to_the_bit(kind, packed):
    tower, patched = pair(kind)
    for each in (tower, patched):
        each.embeds.register_forward_hook(lambda *_: None)
    for batch in batches(20):
        assert error(results(patched, batch), results(tower, batch)) <= 1e-12
    assert packed == 20 * [False]


@pytest.mark.parametrize("how", ["checkpointing", "no norms", "other patches", "rounded", "no grids", "autocast"])
def test_packing_changes_nothing_in_any_way(how, packed, in_double, monkeypatch):
    tower, patched = pair("registers" if how == "rounded" else "gap", norms=how != "no norms")
    patch = 6 if how == "other patches" else PATCH
    if how == "rounded":  # round up the numbers of patches, as on a GPU
        monkeypatch.setattr(adopted, "unpad_images", lambda batch, for_gpu: unpad_images(batch, for_gpu=True))
    for batch in batches(3, patch):
        if how == "checkpointing":
            for each in (tower, patched):
                each.set_grad_checkpointing()
        if how == "no grids":
            batch["patch_valid"] &= torch.rand(batch["patch_valid"].shape) < 0.5
            batch["patch_valid"][:, 5] = True
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            ours, theirs = results(patched, batch), results(tower, batch)
        assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
        assert error(ours, theirs) <= {"autocast": 0.05, "other patches": 1e-5}.get(how, 1e-12)
    assert packed == 3 * [how != "no grids"]


# Changes to a tower that forbid packing: hooks would see packed images, or a layer could not compute them.
WATCHERS = {
    "a hook": (lambda tower: tower.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None), "has a hook"),
    "a hook on the norm": (lambda tower: tower.fc_norm.register_forward_hook(lambda *_: None), ""),
    "a method": (lambda tower: setattr(tower, "_pool", lambda x, **_: x[:, 0]), "one of its methods"),
    "other attention": (lambda tower: setattr(tower.blocks[0].attn, "q_norm", nn.LayerNorm(16).double()), "not plain"),
    "a pool": (lambda tower: setattr(tower, "global_pool", "max"), "its pooling is 'max'"),
}


@pytest.mark.parametrize("what", WATCHERS)
def test_a_watched_tower_gets_padded_images(what, packed):
    tower, patched = pair()
    change, reason = WATCHERS[what]
    for each in (tower, patched):
        change(each)
    (batch,) = batches(1)
    found = []
    for each in (tower, patched):
        torch.manual_seed(3)
        found.append(results(each, batch))
    assert error(*found) <= 1e-6 if not reason else 1e-12
    assert packed == [] if reason else [True]
    assert ("as before" in lines(patched, "pack_image")[0]) == bool(reason)
    assert reason in lines(patched, "pack_image")[0]


@pytest.mark.parametrize("part", ["q", "norm", "mlp.fc1"])
def test_hooks_inside_the_pooling_see_the_images_in_the_order_of_their_batch(part):
    tower = made("registers")
    seen, (*_, batch) = [], batches(2)
    batch = {name: x.flip(0) for name, x in batch.items()}  # put the shortest image first
    for each in (tower, clipfast.apply_to_timm(copy.deepcopy(tower))):
        each.attn_pool.get_submodule(part).register_forward_hook(lambda _, given, __: seen.append(given[0]))
        each(batch)
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["the mask hides the last row", "patches of 2 x 8"])
def test_patches_that_our_op_would_embed_otherwise_are_left_to_timm(how, packed):
    tower, patched = pair()
    size = (2, 8) if how == "patches of 2 x 8" else (PATCH, PATCH)
    coord = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    valid = torch.arange(16)[None] < (12 if how == "the mask hides the last row" else 16)
    patches = torch.randn(1, 16, *size, 3, dtype=torch.float64)
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": valid}
    assert error(results(patched, batch), results(tower, batch)) <= 1e-12
    assert packed == [False]


def test_the_embedding_of_an_older_timm_is_known(packed, in_double):
    tower, patched = pair()
    # The embedding of timm 1.0.24 and older versions has none of these attributes.
    for name in ("channels_last", "pos_embed_antialias", "pos_embed_align_corners"):
        patched.embeds.__dict__.pop(name, None)
    (batch,) = batches(1)
    torch.testing.assert_close(patched(batch), tower(batch), rtol=0, atol=1e-12)
    assert packed == [True]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"patch_drop_rate": 0.5}, "it drops patches"), ({"drop_path_rate": 0.5}, "it drops branches"),
    ({"rope_type": "axial"}, "it has rotary positions"),
    ({"block_fn": naflexvit.Block, "qk_norm": True}, "not plain"),
])  # fmt: skip
def test_other_towers_say_why(changes, reason, packed):
    patched = clipfast.apply_to_timm(made("gap", **changes))
    (batch,) = batches(1)
    patched(batch)
    assert packed == []
    assert reason in lines(patched, "pack_image")[0]
    if reason.startswith("it drops"):  # a tower drops patches or branches in training only
        clipfast.apply_to_timm(patched.eval())(batch)
        patched.train()(batch)
        assert packed == [True]
        assert reason in lines(patched, "pack_image")[0]


def test_images_that_are_not_padded_a_mask_and_a_compiler(packed):
    tower, patched = pair("siglip")
    images = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(patched(images), tower(images), rtol=0, atol=1e-12)
    (batch,) = batches(1)
    mask = torch.zeros(MOST, MOST, dtype=torch.float64)
    torch.testing.assert_close(patched(batch, attn_mask=mask), tower(batch, attn_mask=mask), rtol=0, atol=1e-12)
    empty = {**batch, "patch_valid": torch.zeros_like(batch["patch_valid"])}
    torch.testing.assert_close(patched(empty), tower(empty), rtol=0, atol=1e-12)
    assert packed == []
    compiled = torch.compile(patched, backend="eager")(batch)
    torch.testing.assert_close(compiled, tower(batch), rtol=0, atol=1e-6)


def test_packing_can_be_left_out_and_taken_back(packed, as_on_a_cpu):
    tower = made().float()
    (batch,) = batches(1)
    batch["patches"] = batch["patches"].float()
    expected = tower(batch)
    patched = clipfast.apply_to_timm(copy.deepcopy(tower), pack_image=False)
    patched(batch)
    assert packed == []
    torch.testing.assert_close(clipfast.apply_to_timm(patched)(batch), expected, rtol=0, atol=1e-5)
    assert packed == [False]
    assert torch.equal(clipfast.revert_model(patched)(batch), expected)
    assert replacements(patched) == []


def test_a_tower_of_open_clip(packed):
    import open_clip

    model = shrunk.open_clip_model("ViT-B-32")
    model.visual = open_clip.timm_model.TimmModel("test_vit", 6, proj="none")
    model.visual.trunk = made()
    model.double()
    patched = clipfast.apply_to_open_clip(copy.deepcopy(model))
    (batch,) = batches(1)
    batch["patches"] = batch["patches"].flatten(2)
    torch.testing.assert_close(patched.encode_image(batch), model.encode_image(batch), rtol=0, atol=1e-6)
    assert packed == [True]
    assert len(lines(patched, "pack_image")) == 1
