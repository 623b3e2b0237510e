"""Packed images: a batch of images of several sizes, as one sequence with the patches of one image after the other.

NaFlex (Tschannen et al. 2025) keeps the aspect ratio of each image, with as many patches as fit into a budget.
Usually all images of a batch are padded to the longest; packed images need no padding between them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.common import cdiv
from .packed import TILE, Packed, rounded


@dataclasses.dataclass(frozen=True, eq=False)
class PackedImages(Packed):
    """A batch of B images of several sizes; :func:`pack_images` and :func:`unpad_images` make it.

    The image with the most patches comes first, because a GPU should begin with the tiles that take longest.

    Attributes:
        patches: [N, P P 3], the patches of all images, each image row by row; uint8 or already normalised. Rows after
            the last image have no meaning.
        grids: int32 [B, 2], the rows and columns of patches of each packed image.
        order: int64 [B], for each image of the batch its index among the packed images.
        max_patches: no image has more patches than this.
    """

    patches: Tensor
    grids: Tensor
    order: Tensor
    max_patches: int

    def split(self, size: int, *, for_gpu: bool | None = None) -> list["PackedImages"]:
        """Split the batch into micro-batches of ``size`` images, in the order of the batch; the last may be smaller.

        Args:
            size: the number of images of a micro-batch.
            for_gpu: round the number of patches up (:func:`.packed.rounded`); default: if they are on a GPU.
        """
        if size >= len(self):
            return [self]
        for_gpu = self.device.type != "cpu" if for_gpu is None else for_gpu
        counts = self.grids.prod(1).tolist()
        patches = self.patches[: sum(counts)].split(counts)
        parts = []
        for places in self.order.split(size):
            grids = self.grids[places]
            packed = _longest_first(grids)
            parts.append(_packed([patches[place] for place in places[packed].tolist()], grids, packed, for_gpu))
        return parts

    @property
    def patch_size(self) -> int:
        """The side P of a patch in pixels."""
        return patch_size_of(self.patches)


def patch_size_of(patches: Tensor) -> int:
    """Return the side P of the patches, or of a projection of patches, in the rows of a tensor [..., P P 3].

    Raises:
        ValueError: the rows are no square patches of three channels.
    """
    size, numbers = 1, patches.shape[-1]
    while 3 * size**2 < numbers:  # torch.compile can trace this loop, but not math.isqrt of a dynamic size
        size += 1
    if 3 * size**2 != numbers:
        raise ValueError(f"patches must have rows of P P 3 numbers for a patch size P, got {tuple(patches.shape)}")
    return size


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """Cut images [..., 3, H, W] into patches [..., H W / P^2, P P 3], as timm and transformers do for NaFlex.

    Raises:
        ValueError: a side is not a multiple of the patch size.
    """
    height, width = image.shape[-2:]
    if height % patch_size or width % patch_size or not height * width:
        raise ValueError(
            f"patchify: {height} x {width} pixels cannot be cut into patches of {patch_size} x {patch_size}"
        )
    rows, columns, channels = height // patch_size, width // patch_size, image.shape[-3]
    parts = image.reshape(-1, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    return parts.reshape(*image.shape[:-3], rows * columns, patch_size**2 * channels)


def pack_images(
    images: Sequence[Tensor] | Tensor,
    patch_size: int,
    *,
    for_gpu: bool = False,
    room: Callable[[int, Tensor], Tensor] | None = None,
) -> PackedImages:
    """Pack images of any sizes that are multiples of the patch size, each [3, H, W], uint8 or already normalised.

    Args:
        images: the images, all of one dtype, on one device.
        patch_size: the side of a patch in pixels.
        for_gpu: round the number of patches up (:func:`.packed.rounded`).
        room: allocates memory for the patches: takes their number and one of them, and returns a tensor.

    Raises:
        TypeError: the images have several dtypes, or the patch size is no int.
        ValueError: there is no image, one is not [3, H, W], or a side is not a multiple of the patch size.
    """
    if not len(images):
        raise ValueError("pack_images: there must be at least one image")
    if not isinstance(patch_size, int) or patch_size < 1:
        raise TypeError(f"pack_images: patch_size must be a positive int, got {patch_size!r}")
    for number, image in enumerate(images):
        if image.ndim != 3 or image.dtype != images[0].dtype:
            raise (ValueError if image.ndim != 3 else TypeError)(
                f"pack_images: images must be [3, H, W], all of one dtype, got {tuple(image.shape)} in {image.dtype} "
                f"for image {number}, and {images[0].dtype} for the first"
            )
    if isinstance(images, Tensor) and not for_gpu and room is None:
        return _of_one_size(images, patch_size)
    patches = patchify(images, patch_size) if isinstance(images, Tensor) else [patchify(x, patch_size) for x in images]
    grids = torch.tensor([[side // patch_size for side in image.shape[-2:]] for image in images], dtype=torch.int32)
    packed = _longest_first(grids)
    in_order = [patches.flatten(0, 1)] if isinstance(patches, Tensor) else [patches[place] for place in packed.tolist()]
    return _packed(in_order, grids, packed, for_gpu, room)


def _of_one_size(images: Tensor, patch_size: int) -> PackedImages:
    """Pack images [B, 3, H, W] on their device, without a copy from the host, which a CUDA graph could not hold."""
    patches, count = patchify(images, patch_size), len(images)
    sides = [
        torch.full((count,), side // patch_size, dtype=torch.int32, device=images.device) for side in images.shape[2:]
    ]
    order = torch.arange(count, device=images.device)
    return PackedImages(patches.flatten(0, 1), torch.stack(sides, 1), order, patches.shape[1])


def batch_images(images: Sequence[Tensor], transform: object, *, for_gpu: bool = False) -> Tensor | PackedImages:
    """Return images as one batch: [B, 3, H, W], or packed if ``transform``, which made them, is that of NaFlex models.

    Args:
        images: at least one image, [3, H, W].
        transform: the preprocessing of :func:`clipfast.factory.transform_of`.
        for_gpu: as for :func:`pack_images`.
    """
    patch_size = getattr(transform, "patch_size", None)
    if patch_size is None:
        return torch.stack(list(images))
    return pack_images(images, patch_size, for_gpu=for_gpu)


def unpad_images(batch: Mapping[str, Tensor], *, for_gpu: bool = False) -> PackedImages:
    """Pack a padded batch of timm's NaFlex loader, or of transformers' image processor for SigLIP 2.

    Args:
        batch: "patches" [B, N, P P 3] (or [B, N, P, P, 3]), "patch_coord" [B, N, 2] and "patch_valid" [B, N]; or
            "pixel_values" [B, N, P P 3], "spatial_shapes" [B, 2] and "pixel_attention_mask" [B, N].
        for_gpu: as for :func:`pack_images`.

    Raises:
        ValueError: there is no image or no mask, or the patches of an image are not a whole grid, row by row, before
            its padding.
    """
    patches = batch["patches" if "patches" in batch else "pixel_values"]
    if not len(patches) or not {"patch_valid", "pixel_attention_mask"} & batch.keys():
        raise ValueError(
            f"unpad_images: a batch must have images, and a mask of their patches, got {len(patches)} images with "
            f"{', '.join(batch)}"
        )
    patches = patches.flatten(2)
    valid = batch["patch_valid" if "patch_valid" in batch else "pixel_attention_mask"].bool()
    # As in timm, the coordinates of masked patches count too when the grid of their image is computed.
    grids = batch["patch_coord"].amax(1) + 1 if "patch_coord" in batch else batch["spatial_shapes"]
    counts = grids.prod(1)
    numbers = torch.arange(valid.shape[1], device=valid.device)
    wrong = ((numbers < counts[:, None]) != valid).any(1) | (counts > valid.shape[1]) | (counts < 1)
    if "patch_coord" in batch:
        widths = grids[:, 1:].clamp(min=1)
        in_rows = torch.stack([numbers // widths, numbers % widths], -1)
        wrong |= ((in_rows != batch["patch_coord"]).any(-1) & valid).any(1)
    if wrong.any():
        image = int(wrong.nonzero()[0])
        height, width = grids[image].tolist()
        raise ValueError(
            f"unpad_images: image {image} must have its {height} x {width} patches first, row by row, and then padding"
        )
    packed = _longest_first(grids)
    return _packed([patches[packed][valid[packed]]], grids, packed, for_gpu)


def _longest_first(grids: Tensor) -> Tensor:
    """Return the indices of images in packed order, those with the most patches first: int64 [B]."""
    return grids.prod(1).argsort(descending=True, stable=True)


def _packed(
    patches: list[Tensor],
    grids: Tensor,
    packed: Tensor,
    for_gpu: bool,
    room: Callable[[int, Tensor], Tensor] | None = None,
) -> PackedImages:
    """Return packed images from patches in the order ``packed`` (indices of images), and grids in the batch's order."""
    counts = grids.prod(1)
    used, longest = int(counts.sum()), int(counts.max())
    if for_gpu:
        longest = TILE * cdiv(longest, TILE)  # each longest length needs launch plans of its own, so it is rounded
        unused = rounded(used, len(grids) * longest) - used
        patches = [*patches, patches[0].new_zeros(unused, patches[0].shape[-1])]
    device = patches[0].device
    together = torch.cat(patches, out=None if room is None else room(sum(map(len, patches)), patches[0][0]))
    return PackedImages(together, grids[packed].int().to(device), packed.argsort().to(device), longest)
