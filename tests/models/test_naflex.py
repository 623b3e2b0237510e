"""Test NaFlex image towers against timm's and transformers' on padded batches of random sizes."""

import dataclasses
import json

import pytest
import torch

import clipfast
from clipfast.kernels.packing import pack
from clipfast.models import CLIPConfig, build, registry, siglip
from clipfast.models.naflex import NaFlexVision, mean_of_images
from clipfast.models.naflex_config import NaFlexConfig
from clipfast.models.packed_images import pack_images, unpad_images
from clipfast.models.siglip_config import EXACT, TANH

from .naflex import PATCH, mixes, naflex_vit, padded

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

SIZES = {
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "mlp_ratio": 2.0,
    "patch_size": PATCH,
    "pos_embed_grid_size": (5, 5),
}
SIGLIP = NaFlexConfig(**SIZES, pool="map", interpolation="bilinear")
GAP = NaFlexConfig(**SIZES, pool="avg", reg_tokens=4, init_values=0.5, interpolation="bicubic")


def timm_tower(config):
    """Return timm's NaFlex tower with the settings of ``config``."""
    return naflex_vit(
        act_layer="gelu_tanh" if config is SIGLIP else None, global_pool=config.pool, reg_tokens=config.reg_tokens,
        init_values=config.init_values, pos_embed_interp_mode=config.interpolation,
    )  # fmt: skip


def random_weights(module):
    """Give every parameter random values, so that none is without effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3).add_(parameter.ndim == 1)
    return module


def with_gradients(compute, tower, weights):
    """Return the features that ``compute`` returns, and the gradients of a tower's parameters by timm's names."""
    tower.zero_grad()
    features = compute()
    (features * weights).sum().backward()
    gradients = {name.removeprefix("trunk."): parameter.grad for name, parameter in tower.named_parameters()}
    return {"features": features.detach()} | gradients


def assert_near(found, expected):
    """Check that no difference is larger than 1e-5 of the largest value of a tensor, or of each tensor in a dict."""
    if isinstance(expected, dict):
        for name, x in expected.items():
            assert_near(found[name], x)
        return
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("patch", [PATCH, 2, 3, 5, 8])
@pytest.mark.parametrize("config", [SIGLIP, GAP], ids=["siglip", "gap"])
def test_towers_are_timms(config, patch):
    """The patches of a batch may have another size than those of the NaFlex tower."""
    theirs = random_weights(timm_tower(config)).double()
    ours = NaFlexVision(config, 32, TANH if config is SIGLIP else EXACT).double()
    ours.trunk.load_state_dict(theirs.state_dict())
    if config.pool == "avg":
        ours.head["proj"].weight.data.copy_(torch.eye(32))
    for images in mixes(12 if patch == PATCH else 5, patch):
        batch, weights = padded(images, patch), torch.randn(len(images), 32, dtype=torch.float64)
        expected = with_gradients(lambda batch=batch: theirs(batch), theirs, weights)
        for form in (pack_images(images, patch), pack_images(images, patch, for_gpu=True), batch):
            with torch.inference_mode():
                assert_near(ours(form), expected["features"])
            assert_near(with_gradients(lambda form=form: ours(form), ours, weights), expected)


def hugging_face_weights(state):
    """Return the weights of our tower by transformers' names."""
    found = {}
    whole = {
        "embeds.proj": "embeddings.patch_embedding",
        "norm": "post_layernorm",
        "attn_pool.proj": "head.attention.out_proj",
        "attn_pool.norm": "head.layernorm",
        "attn_pool.mlp": "head.mlp",
    }
    of_block = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp": "mlp"}
    whole |= {
        f"blocks.{i}.{ours}": f"encoder.layers.{i}.{theirs}" for i in range(2) for ours, theirs in of_block.items()
    }
    for name, x in state.items():
        module, _, kind = name.rpartition(".")
        if name == "embeds.pos_embed":
            found["embeddings.position_embedding.weight"] = x.flatten(0, 2)
        elif name == "attn_pool.latent":
            found["head.probe"] = x
        elif module == "attn_pool.q":
            found[f"head.attention.in_proj_{kind}"] = torch.cat([x, state[f"attn_pool.kv.{kind}"]])
        elif module.endswith("attn.qkv"):
            for part, own in zip("qkv", x.chunk(3), strict=True):
                found[f"encoder.layers.{module.split('.')[1]}.self_attn.{part}_proj.{kind}"] = own
        elif module != "attn_pool.kv":
            prefix = next(ours for ours in sorted(whole, key=len, reverse=True) if name.startswith(f"{ours}."))
            found[whole[prefix] + name.removeprefix(prefix)] = x
    return found


def test_tower_is_that_of_transformers():
    config = transformers.Siglip2VisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=PATCH,
        num_patches=25, attn_implementation="eager",
    )  # fmt: skip
    theirs, ours = (
        transformers.Siglip2VisionModel(config).double(),
        random_weights(NaFlexVision(SIGLIP, 32, TANH)).double(),
    )
    theirs.load_state_dict(hugging_face_weights(ours.trunk.state_dict()))
    for images in mixes(12, least_width=1):
        batch = padded(images)
        shapes = torch.tensor([[side // PATCH for side in image.shape[1:]] for image in images])
        given = {
            "pixel_values": batch["patches"].flatten(2), "pixel_attention_mask": batch["patch_valid"].int(),
            "spatial_shapes": shapes,
        }  # fmt: skip
        weights = torch.randn(len(images), 32, dtype=torch.float64)
        expected = with_gradients(lambda given=given: theirs(**given).pooler_output, theirs, weights)
        found = with_gradients(lambda given=given: ours(given), ours, weights)
        assert_near(found.pop("features"), expected.pop("features"))
        assert_near(hugging_face_weights(found), expected)


def test_bytes_are_normalised_in_the_tower():
    tower = random_weights(NaFlexVision(SIGLIP, 32, TANH, is_siglip=True))
    images = [
        torch.randint(0, 256, (3, 8, 20), dtype=torch.uint8),
        torch.randint(0, 256, (3, 12, 4), dtype=torch.uint8),
    ]
    floats = [(image / 255 - 0.5) / 0.5 for image in images]
    assert_near(tower(pack_images(images, PATCH)), tower(pack_images(floats, PATCH)))


def test_images_of_one_size_and_their_order():
    tower = random_weights(NaFlexVision(GAP, 32))
    images = torch.randn(5, 3, 12, 20)
    alone = torch.cat([tower(image[None]) for image in images])
    assert_near(tower(images), alone)
    small = torch.randn(3, 4, 4)
    assert_near(tower(pack_images([small, *images], PATCH)), torch.cat([tower(small[None]), alone]))


@pytest.mark.parametrize("form", ["inline", "selective"])
def test_recomputed_blocks_have_the_same_gradients(form):
    tower = random_weights(NaFlexVision(GAP, 32)).double()
    images = pack_images(next(mixes(1)), PATCH)
    expected = with_gradients(lambda: tower(images), tower, 1)
    tower.trunk.grad_checkpointing = True if form == "inline" else "selective"
    torch.testing.assert_close(with_gradients(lambda: tower(images), tower, 1), expected)


def test_many_patches_are_pooled_too(monkeypatch):
    # The op for attention pooling takes at most 1,024 tokens of an image; PyTorch's attention pools larger images.
    tower = random_weights(NaFlexVision(SIGLIP, 32, TANH)).double()
    images = pack_images(next(mixes(1)), PATCH)
    expected = with_gradients(lambda: tower(images), tower, 1)
    monkeypatch.setattr(siglip, "MAX_TOKENS", 1)
    assert_near(with_gradients(lambda: tower(images), tower, 1), expected)


def test_batches_that_are_no_grids_are_refused():
    batch = padded([torch.randn(3, 8, 12), torch.randn(3, 4, 8)])
    batch["patch_valid"][1, 0] = False  # patch dropout leaves batches that lack some patches of an image
    with pytest.raises(ValueError, match="unpad_images: image 1 must have its 1 x 2 patches first"):
        unpad_images(batch)
    batch = padded([torch.randn(3, 8, 12)])
    batch["patch_valid"][0, 3:] = False  # only the first of two rows of patches is valid
    with pytest.raises(ValueError, match="unpad_images: image 0 must have its 2 x 3 patches first"):
        unpad_images(batch)
    with pytest.raises(ValueError, match="patchify: 9 x 8 pixels cannot be cut into patches of 4 x 4"):
        pack_images([torch.randn(3, 9, 8)], PATCH)
    with pytest.raises(ValueError, match="at least one image"):
        pack_images([], PATCH)


def small_config(tower, **vision):
    """Return the configuration of a small model in OpenCLIP's layout."""
    kwargs = {"patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0,
              "pos_embed_grid_size": [5, 5]}  # fmt: skip
    is_siglip = "siglip" in tower
    pool = {"timm_pool": "map", "timm_proj": "none"} if is_siglip else {}
    raw = {
        "embed_dim": 32 if is_siglip else 16,
        "custom_text": True,
        "vision_cfg": {"image_size": 20, "timm_model_name": tower, "timm_model_kwargs": kwargs, **pool, **vision},
        "text_cfg": {"context_length": 9, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1},
    }
    if is_siglip:
        raw["text_cfg"] |= {
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        }
        raw["init_logit_bias"] = -10
    return raw


@pytest.mark.parametrize("tower", ["naflexvit_base_patch16_siglip", "naflexvit_base_patch16_gap"])
def test_weights_of_open_clip_are_loaded(tower, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    raw = small_config(tower)
    (tmp_path / "small.json").write_text(json.dumps(raw))
    clipfast.add_model_config(tmp_path / "small.json")
    model = random_weights(clipfast.create_model("small"))
    assert CLIPConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    kwargs = raw["vision_cfg"]["timm_model_kwargs"] | {"pos_embed_grid_size": (5, 5)}
    theirs = timm.create_model(tower, num_classes=0, **kwargs)
    state = model.state_dict()
    assert {f"visual.trunk.{name}" for name in theirs.state_dict()} == {name for name in state if "trunk" in name}
    # OpenCLIP's models with custom_text have a prefix before the names of the text tower.
    of_text = ("positional_embedding", "text_projection", "token_embedding", "ln_final", "transformer")
    torch.save(
        {f"text.{name}" if name.startswith(of_text) else name: x for name, x in state.items()}, tmp_path / "w.pt"
    )
    loaded = clipfast.create_model("small", str(tmp_path / "w.pt"), backend="torch")
    assert all(map(torch.equal, loaded.state_dict().values(), state.values()))
    images = pack_images([torch.randint(0, 256, (3, 8, 20), dtype=torch.uint8), torch.zeros(3, 4, 4).byte()], PATCH)
    texts = torch.randint(1, 29, (2, 9))
    for found, expected in zip(loaded(images, texts), model(images, texts), strict=True):
        assert_near(found, expected)
    model.set_grad_checkpointing()
    model.lock_image_tower(unlocked_groups=1)
    model.encode_image(torch.randn(2, 3, 20, 12), normalize=True).sum().backward()
    assert model.visual.trunk.embeds.proj.weight.grad is None
    assert {"visual.trunk.embeds.pos_embed"} < model.no_weight_decay()
    listed = [torch.randint(0, 256, (3, 8, 20), dtype=torch.uint8), torch.zeros(3, 4, 4).byte()]
    assert torch.equal(model.encode_image(listed), model.encode_image(pack_images(listed, PATCH)))
    with pytest.raises(ValueError, match="rows of P P 3 numbers for a patch size P"):
        model.encode_image(dataclasses.replace(images, patches=images.patches[:, 1:]))


@pytest.mark.parametrize("name", [name for name in clipfast.list_models() if "naflex" in name])
def test_published_models_have_the_parameters_of_timms(name):
    config = clipfast.get_model_config(name)
    assert CLIPConfig.from_dict(config.to_dict()) == config
    vision = config.vision
    kwargs = {"depth": 2, "patch_size": vision.patch_size, "pos_embed_grid_size": vision.pos_embed_grid_size}
    theirs = timm.create_model(vision.timm_model_name, num_classes=0, **kwargs).state_dict()
    with torch.device("meta"):
        ours = build(config.with_vision(layers=2)).visual.trunk.state_dict()
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in theirs.items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timm_model_name": "naflexvit_base_patch16_map"}, "clipfast builds no tower 'naflexvit_base_patch16_map'"),
        ({"timm_model_kwargs": {"swiglu_mlp": True}}, r"timm_model_kwargs that clipfast does not implement: .*swiglu"),
        ({"timm_pool": "token"}, r"does not implement in a NaFlex tower: {'timm_pool': 'token'}"),
        ({"patch_dropout": 0.5}, "clipfast drops no patches in a NaFlex tower"),
        ({"timm_model_kwargs": {"pos_embed_interp_mode": "nearest"}}, "bilinear or bicubic, got 'avg' and"),
    ],
)  # fmt: skip
def test_towers_that_are_not_built_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        CLIPConfig.from_dict(small_config("naflexvit_base_patch16_gap", **changed))


def of_patches(patch):
    """Return packed images of three heights, with patches of this size."""
    return pack_images([torch.randn(3, patch * rows, patch * 9) for rows in (1, 17, 2)], patch)


@pytest.mark.parametrize("config", [SIGLIP, GAP], ids=["siglip", "gap"])
def test_autocast(config):
    tower, images = NaFlexVision(config, 32), of_patches(PATCH)
    expected = tower(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = tower(images)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def test_compilation():
    # test_naflex_step.py compiles a tower that averages its tokens.
    torch.compiler.reset()
    tower = NaFlexVision(SIGLIP, 32)
    compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
    for patch in (PATCH, 2, 8):
        images = of_patches(patch)
        assert_near(compiled(images), tower(images))


def test_a_value_that_is_no_number_stays_in_its_image_and_sums_do_not_overflow():
    tokens = torch.full((12, 8), 100.0, dtype=torch.float16)
    tokens[5] = float("nan")
    packing = pack(torch.tensor([0, 4, 8, 12], dtype=torch.int32), 12)
    found = mean_of_images(tokens, packing, 1)
    assert found.isnan().all(1).tolist() == [False, True, False]
    many = torch.full((1030, 8), 100.0, dtype=torch.float16)
    assert (mean_of_images(many, pack(torch.tensor([0, 1030], dtype=torch.int32), 1030), 6) == 100).all()
