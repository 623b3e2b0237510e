"""Replacement of timm's ``NaFlexVit``, whose padded batches of images of several sizes are computed without padding.

The tokens of all images are one sequence, [1, T, C]. Blocks and the attention pooling get the bounds of the images in
the place of the mask. The class's own ``forward`` runs for a batch that cannot be packed, and for a tower with hooks.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import patch_embed_packed
from ..kernels.attention_pool import MAX_TOKENS
from ..kernels.packing import Packing, pack
from ..kernels.patch_embed_packed.op import INTERPOLATIONS
from ..models.layers import PackedTokens, is_plain
from ..models.naflex import mean_of_images, places_of, resize_weight
from ..models.packed import TILE, rounded
from ..models.packed_images import PackedImages, unpad_images
from ..models.packed_text import has_values
from . import packable
from .parts import GELUS, NORMS, drops
from .places import Proposal, class_name, computes, is_left, is_untouched, on_cpus, propose_unless, runs_ours

KIND = "pack_image"
PACKS = "no patch that is padding"
TOWER = "timm.models.naflexvit.NaFlexVit"
# Options of timm's embedding that older versions lack, with the values by which newer versions compute the same.
_LATER = {
    "channels_last": True, "pos_embed_antialias": True, "pos_embed_align_corners": False,
    "pos_embed_use_grid_sample": False,
}  # fmt: skip
_METHODS = ("forward_features", "forward_head", "_forward_embeds", "_pool")
_DROP_PATH = "timm.layers.drop.DropPath"
_BLOCK = "timm.models.vision_transformer.Block"
# The classes of modules in blocks that compute each token by itself, and the classes of attention.
_PLAIN = {
    *NORMS, *GELUS, _BLOCK, _DROP_PATH, "timm.layers.mlp.Mlp", "timm.layers.activations.GELUTanh",
    "timm.layers.norm.RmsNorm", "timm.layers.layer_scale.LayerScale", "timm.models.vision_transformer.LayerScale",
    "timm.layers.attention.Attention", "timm.models.vision_transformer.Attention",
    *(f"torch.nn.modules.{name}" for name in ("linear.Linear", "linear.Identity", "dropout.Dropout")),
    "torch.nn.modules.container.Sequential",
}  # fmt: skip


def propose_tower(tower: Any) -> Iterator[Proposal]:
    """Propose to pack the images of timm's NaFlexVit, or say why they are padded."""
    yield propose_unless(_why_not_packed(tower), KIND, PACKS, naflex_vit)


def _why_not_packed(tower: Any) -> str:
    """Return the reason why timm's NaFlexVit cannot compute packed images in its current mode, or "" if it can."""
    if tower.rope is not None:
        return "it has rotary positions"
    if tower.training and tower.patch_drop is not None:
        return "it drops patches"
    if any(drops(part, part.drop_prob or 0) for part in tower.blocks.modules() if class_name(part) == _DROP_PATH):
        return "it drops branches of images"
    pool = tower.attn_pool
    if pool is not None and (pool.pos_embed is not None or not runs_ours(pool)):
        return "its attention pooling is not ours, or has positions of its own"
    if pool is None and tower.global_pool not in ("avg", "token"):
        return f"its pooling is {tower.global_pool!r}"
    if any(method in tower.__dict__ for method in _METHODS):
        return "something else has replaced one of its methods"
    outside = [tower.norm_pre, tower.norm, *(() if pool is None else (pool,))]
    watched = not all(is_untouched(part) for whole in outside for part in whole.modules())
    if watched or (pool is not None and not is_plain(pool.kv, nn.Linear)):
        return "its norm or its pooling has a hook, or something else has replaced it"
    if any(class_name(part) not in _PLAIN for part in outside[:2]):
        return "its norm is not one of the layer norms that are known"
    refusal = packable.why_not_packed(tower.blocks, lambda part: class_name(part) in _PLAIN)
    if not refusal and not all(map(_takes_packed, tower.blocks)):
        refusal = "its attention is not ours, or not plain"
    return refusal


def _takes_packed(block: Any) -> bool:
    """Return True if a block of timm's NaFlexVit takes a packing in the place of its mask."""
    attn = block.attn
    if class_name(block) != _BLOCK or not runs_ours(attn) or drops(attn, attn.attn_drop.p):
        return False
    return is_plain(attn.q_norm, nn.Identity) and is_plain(attn.k_norm, nn.Identity)


@on_cpus
def naflex_vit(
    tower: Any, x: Tensor | Mapping[str, Tensor], patch_coord: Tensor | None = None,
    patch_valid: Tensor | None = None, attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute timm's ``NaFlexVit``: a padded batch of patches, or images [B, 3, H, W] -> [B, num_classes or width]."""
    given = x if isinstance(x, Mapping) else {"patches": x, "patch_coord": patch_coord, "patch_valid": patch_valid}
    batch: dict[str, Any] = {name: given.get(name) for name in ("patches", "patch_coord", "patch_valid")}
    mask = given.get("attn_mask", attn_mask)
    tokens = None
    if mask is None and _is_padded(batch) and not _why_not_packed(tower):
        tokens = _packed_tokens(tower, batch)
    if tokens is None:
        return type(tower).forward(tower, x, patch_coord, patch_valid, attn_mask)
    x, places, order = tokens
    x = tower.norm_pre(x)
    for block in tower.blocks:
        if tower.grad_checkpointing:
            x = checkpoint(block, x, places.packing, use_reentrant=False)
        else:
            x = block(x, attn_mask=places.packing)
    pooled = _pooled(tower, tower.norm(x), places)[order]
    return tower.head(tower.head_drop(tower.fc_norm(pooled)))


def _is_padded(batch: Mapping[str, Any]) -> bool:
    """Return True if a batch for timm's NaFlexVit has padded patches whose values can be read here."""
    patches, valid = batch["patches"], batch["patch_valid"]
    if any(not isinstance(x, Tensor) for x in batch.values()) or valid.ndim != 2 or not len(valid):
        return False
    return patches.is_floating_point() and computes(patches) and has_values(valid)


def _packed_tokens(tower: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, PackedTokens, Tensor] | None:
    """Return the tokens of a batch for timm's NaFlexVit [1, T, C], the bounds of the images, and their packed order.

    The image with the most patches comes first. None is returned if an image has no patch, or more than can be pooled.
    """
    valid = batch["patch_valid"].bool()
    prefix = tower.num_prefix_tokens
    counts = valid.sum(1).cpu()
    longest, on_gpu = prefix + int(counts.max()), valid.device.type != "cpu"
    if counts.min() < 1 or (tower.attn_pool is not None and longest + (TILE - 1 if on_gpu else 0) > MAX_TOKENS):
        return None
    images = _images(tower, batch)
    if images is not None:
        tokens, packing = _embedded(tower.embeds, images)
        return tokens[None], PackedTokens(packing, prefix + images.max_patches), images.order
    padded = tower.embeds(batch["patches"], patch_coord=batch["patch_coord"], patch_valid=valid)[0]
    packed = counts.argsort(descending=True, stable=True)
    used = int(counts.sum()) + prefix * len(counts)
    total = rounded(used, padded.shape[0] * padded.shape[1]) if on_gpu else used
    ends = F.pad((counts[packed] + prefix).cumsum(0), (1, 0)).int().to(valid.device)
    packed = packed.to(valid.device)
    tokens = padded[packed][F.pad(valid, (prefix, 0), value=True)[packed]]
    places = PackedTokens(pack(ends, total), longest)
    return F.pad(tokens, (0, 0, 0, total - used))[None], places, packed.argsort()


def _images(tower: Any, batch: Mapping[str, Tensor]) -> PackedImages | None:
    """Return the images of a batch if our op embeds them as timm's NaFlexVit does; None if only timm's layers can."""
    embeds, patches = tower.embeds, batch["patches"]
    if is_left(patches) or embeds.pos_embed_type != "learned" or embeds.pos_embed_interp_mode not in INTERPOLATIONS:
        return None
    parts = (embeds.proj, embeds.norm, embeds.pos_drop)
    is_known = embeds.is_linear and embeds.norm_input is None and is_untouched(embeds)
    is_known = is_known and all(map(is_plain, parts, (nn.Linear, nn.Identity, nn.Dropout)))
    if not is_known or any(getattr(embeds, name, usual) != usual for name, usual in _LATER.items()):
        return None
    sides, channels = tuple(patches.shape[2:4]), patches.shape[4:]
    is_resized = patches.ndim == 5 and sides != embeds.patch_size
    # Patches of another size need the projection resized, which is done for square patches of RGB images only.
    if is_resized or embeds.proj.weight.shape[1] != patches.flatten(2).shape[2]:
        is_known = embeds.enable_patch_interpolator and len(set(sides)) == len(set(embeds.patch_size)) == 1
        is_known = is_known and channels == (3,) and embeds.in_chans == 3
    if not is_known or drops(embeds, embeds.pos_drop.p):
        return None
    try:
        return unpad_images(batch, for_gpu=patches.device.type != "cpu")
    except ValueError:  # the patches of an image are no grid
        return None


def _embedded(embeds: Any, images: PackedImages) -> tuple[Tensor, Packing]:
    """Return the tokens of packed images by timm's embedding, [T, C], with prefix tokens, and the images' bounds."""
    prefix = [x[0] for x in (embeds.cls_token, embeds.reg_token) if x is not None]
    packing, weight = places_of(images, embeds.num_prefix_tokens), embeds.proj.weight
    if weight.shape[1] != images.patches.shape[1]:
        weight = resize_weight(weight, images.patch_size, embeds.patch_interpolator.interpolation)
    tokens = patch_embed_packed(
        images.patches, images.grids, weight, embeds.pos_embed[0], cu_seqlens=packing, bias=embeds.proj.bias,
        prefix=torch.cat(prefix) if prefix else None, interpolation=embeds.pos_embed_interp_mode,
        keep_aspect=embeds.pos_embed_ar_preserving, mean=(0.0,), std=(1.0,),  # mean and std: for uint8 patches only
    )  # fmt: skip
    # Under autocast, the prefix tokens stay in float32 in timm, and so do the tokens beside them.
    return tokens.to(torch.promote_types(tokens.dtype, prefix[0].dtype)) if prefix else tokens, packing


def _pooled(tower: Any, x: Tensor, places: PackedTokens) -> Tensor:
    """Return timm's pooling of the tokens of each packed image: [1, T, C] -> [B, C]."""
    left_out = 0 if tower.pool_include_prefix else tower.num_prefix_tokens
    if tower.attn_pool is not None:
        x, places = _without_prefix(x, places, left_out) if left_out else (x, places)
        return tower.attn_pool(x, attn_mask=places)
    if tower.global_pool == "token":
        return x[0, places.packing.cu_seqlens[:-1].long()]
    return mean_of_images(x[0], places.packing, left_out)


def _without_prefix(x: Tensor, places: PackedTokens, prefix: int) -> tuple[Tensor, PackedTokens]:
    """Return the tokens of packed images, [1, T, C], without the first ``prefix`` of each image, and new bounds."""
    ends = places.packing.cu_seqlens
    number = torch.arange(len(ends), dtype=ends.dtype, device=ends.device)
    packing = pack(ends - prefix * number, x.shape[1] - prefix * (len(ends) - 1))
    rows = torch.arange(len(packing.sequence), device=x.device) + prefix * (packing.sequence.long() + 1)
    return x[:, rows.clamp(max=x.shape[1] - 1)], PackedTokens(packing, places.max_seqlen - prefix)
