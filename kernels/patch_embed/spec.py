"""The specification of the patch embedding: sizes, inputs, cases, floor, and the calls that are compiled offline."""

import dataclasses
from contextlib import AbstractContextManager

import torch

from .. import reference
from ..configs import Config, GemmConfig, RowConfig, config_key, overrides
from ..spec import CUDA, NOT_INTERPRETED, Call, Case, Draw, Floor, OpSpec, Shape, Shipped, Target, Tunable, on
from .op import patch_embed


@dataclasses.dataclass(frozen=True)
class PatchShape(Shape):
    """Images [batch, 3, height, width] as bytes or floats, and a projection [embed_dim, 3, patch_size, patch_size].

    With ``keep``, only this many patches of each image become tokens.
    """

    batch: int
    height: int
    width: int
    patch_size: int
    embed_dim: int
    uint8: bool = True
    keep: int | None = None

    @property
    def patches(self) -> int:
        """The number of patches that the op ``patch_embed`` cuts an image into."""
        return (self.height // self.patch_size) * (self.width // self.patch_size)

    @property
    def kept(self) -> int:
        """The number of patches of an image that become tokens."""
        return self.patches if self.keep is None else self.keep

    @property
    def elements(self) -> int:
        """The number of pixels, or of elements of the result, whichever is larger."""
        return self.batch * max(3 * self.height * self.width, (1 + self.patches) * self.embed_dim)


def make(shape: PatchShape, values: str, draw: Draw) -> Call:
    """Make random images, parameters and, with ``keep``, the indices of the kept patches in random order."""
    size = shape.batch, 3, shape.height, shape.width
    images = draw.integers(0, 256, *size, dtype=torch.uint8) if shape.uint8 else draw.normal(*size)
    weight = draw.normal(shape.embed_dim, 3, shape.patch_size, shape.patch_size) / shape.patch_size
    if values.startswith("all "):
        images.fill_(int(values.removeprefix("all ")))
    elif values == "large":
        images *= 100
    elif values == "one-hot":
        weight = torch.eye(shape.embed_dim, weight[0].numel(), device=draw.device).view_as(weight)
    elif values == "duplicate rows":
        images = images[:1].repeat(shape.batch, 1, 1, 1)
    elif values == "tiny weight":
        weight *= 1e-3
    scale = 0.0 if values == "tiny weight" else 1.0  # class token and positions must not hide tiny products
    inputs = {
        "images": images,
        "weight": weight,
        "class_embedding": scale * draw.normal(shape.embed_dim),
        "positional_embedding": scale * draw.normal(1 + shape.patches, shape.embed_dim),
    }
    if shape.keep is not None:
        inputs["keep"] = draw.subsets(shape.batch, shape.patches, shape.keep)
    return Call(inputs, (draw.normal(shape.batch, 1 + shape.kept, shape.embed_dim),))


def floor(shape: PatchShape, itemsize: int, backward: bool) -> Floor:
    """Count the work of the patch embedding.

    Forward, one product reads the pixels of kept patches, the parameters and 8 bytes of index for each kept patch.
    Backward, one product gives the gradient of the weight, and each position has a gradient. The gradient of floating
    images takes another product, which reads the weight.
    """
    pixels_of_patch, row = 3 * shape.patch_size**2, shape.embed_dim * itemsize
    product = 2 * shape.batch * shape.kept * pixels_of_patch * shape.embed_dim
    indices = 0 if shape.keep is None else 8 * shape.batch * shape.kept
    pixels = shape.batch * shape.kept * pixels_of_patch * (1 if shape.uint8 else itemsize)
    weight, tokens = pixels_of_patch * row, shape.batch * (1 + shape.kept) * row
    read_and_made = pixels + indices + weight + row + tokens  # the row is the class token
    if not backward:
        return Floor(product, read_and_made + (1 + shape.kept) * row)
    of_parameters = Floor(product, read_and_made + (1 + shape.patches) * row)
    if shape.uint8:
        return of_parameters
    return of_parameters + Floor(product, weight + 3 * shape.batch * shape.height * shape.width * itemsize)


def small_tiles(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Take tiles of 16 rows and columns, so that a few patches make several tiles."""
    small: dict[str, Config] = {
        config_key(f"patch_embed_{name}", dtype): GemmConfig(16, 16, 16, num_warps=4, num_stages=1)
        for name in ("fwd", "bwd_weight", "bwd_images", "tokens", "weight_sums")
    }
    for name in ("bwd_pos", "rows"):
        small[config_key(f"patch_embed_{name}", dtype)] = RowConfig(2, 16, num_warps=1, num_stages=1)
    return overrides(small)


TINY = PatchShape(2, 8, 12, 4, 10, uint8=False)
SMALL, WIDE = PatchShape(2, 28, 28, 14, 40), PatchShape(2, 28, 42, 14, 40)

# Cases that are checked with images as bytes and with floating images.
OF_BOTH = [
    Case(PatchShape(2, 224, 224, 32, 768), "B/32", NOT_INTERPRETED, quick=True),
    Case(PatchShape(1, 224, 224, 16, 768), "B/16", NOT_INTERPRETED),
    Case(PatchShape(1, 224, 224, 14, 1024), "L/14: 588 pixels a patch, which no tile divides", NOT_INTERPRETED),
    Case(PatchShape(1, 336, 336, 14, 1024), "L/14 at 336 pixels", on(CUDA)),
    Case(PatchShape(1, 224, 224, 14, 1280), "H/14", on(CUDA)),
    Case(PatchShape(1, 224, 224, 14, 1408), "g/14", on(CUDA)),
    Case(PatchShape(1, 224, 224, 14, 1664), "bigG/14", NOT_INTERPRETED),
    Case(PatchShape(64, 224, 224, 16, 768), "B/16, a batch: the weight gradient is split", on(CUDA)),
    # edge cases
    Case(PatchShape(1, 8, 8, 8, 16), "one patch, one image"),
    Case(PatchShape(2, 28, 28, 14, 24), "patch size 14, several tiles of pixels", sanitize=True),
    Case(SMALL, "patch size 14, and a width that no tile divides", quick=True),
    Case(PatchShape(3, 16, 24, 8, 20), "several tiles of tokens, across images", sanitize=True),
    Case(PatchShape(3, 32, 48, 16, 72), "not square; the width is past a tile"),
    Case(PatchShape(5, 64, 32, 32, 24), "patch size 32; a prime number of images"),
    Case(PatchShape(2, 21, 35, 7, 40), "patch size 7: rows of 7 pixels, which no vector load divides"),
    Case(PatchShape(7, 24, 24, 8, 63), "as many rows as a tile less one; the width one less than a tile"),
    Case(PatchShape(5, 40, 40, 8, 65), "130 rows: past a tile; the width one past a tile"),
    Case(PatchShape(0, 28, 28, 14, 40), "no images"),
    # dropped patches
    Case(PatchShape(2, 224, 224, 16, 768, keep=98), "B/16, half of the patches dropped", NOT_INTERPRETED),
    Case(PatchShape(64, 224, 224, 16, 768, keep=49), "B/16, a batch, three quarters of the patches dropped", on(CUDA)),
    Case(PatchShape(35, 21, 35, 7, 40, keep=7), "dropped patches; several tiles of images", quick=True),
    Case(PatchShape(3, 16, 24, 8, 20, keep=4), "dropped patches, several tiles of tokens", sanitize=True),
    Case(PatchShape(3, 28, 28, 14, 40, keep=0), "every patch dropped: the class token alone"),
    *(
        Case(shape.changed(keep=keep), f"{keep} of {shape.patches} patches kept")
        for shape in (PatchShape(1, 8, 8, 8, 16), SMALL, PatchShape(3, 32, 48, 16, 72), PatchShape(5, 64, 32, 32, 24), PatchShape(2, 21, 35, 7, 40))
        for keep in sorted({0, 1, shape.patches // 2, shape.patches})
    ),
    Case(PatchShape(0, 28, 28, 14, 40, keep=2), "no images, and patches are dropped"),
    Case(WIDE, "pixels as a decoder leaves them", layout="hwc", quick=True),
    Case(WIDE.changed(keep=3), "dropped patches: pixels as a decoder leaves them", layout="hwc"),
    *Case.layouts(WIDE, expanded=SMALL, quick=False),
    *Case.layouts(WIDE.changed(keep=3), quick=False),
]  # fmt: skip
CASES = [
    *(
        dataclasses.replace(case, shape=case.shape.changed(uint8=uint8))
        for case in OF_BOTH
        for uint8 in (True, False)
    ),
    *(
        Case(PatchShape(batch, 8, 16, 4, 9, uint8=False, keep=3), "one past or less than a tile of images, and several")
        for batch in (1, 31, 33, 70)
    ),
    Case.extreme(SMALL, "all 0", "black: the low end of the range"),
    Case.extreme(SMALL, "all 128", "the byte that becomes 0 inside"),
    Case.extreme(SMALL, "all 255", "white: the high end of the range", quick=True),
    Case.extreme(PatchShape(2, 28, 28, 14, 40, uint8=False), "large", "pixels of 100: far outside what a model sees", quick=True),
    Case.extreme(SMALL, "one-hot", "each row of the weight reads one pixel"),
    Case.extreme(PatchShape(4, 28, 28, 14, 40), "duplicate rows", "the same image again and again"),
    Case.extreme(SMALL, "tiny weight", "weights of 1e-4: folding the normalisation must not flush them"),
    *Case.repeats(PatchShape(3, 32, 48, 16, 72, uint8=False), PatchShape(64, 224, 224, 16, 768)),
    *Case.repeats(PatchShape(70, 32, 48, 16, 72, True, 3), PatchShape(256, 224, 224, 16, 768, True, 98)),
    *Case.repeats(PatchShape(70, 32, 48, 16, 72, False, 3), PatchShape(256, 224, 224, 16, 768, False, 98)),
    *Case.repeats(PatchShape(8, 112, 112, 16, 256), PatchShape(64, 224, 224, 16, 768, False)),
]  # fmt: skip

# L/14, B/16, B/32 and H/14, the most informative first.
TOWERS = ((14, 1024), (16, 768), (32, 768), (14, 1280))
PARAMETERS = {"class_embedding": "fp32", "positional_embedding": "fp32"}


def _bench(batch: int) -> tuple[PatchShape, ...]:
    """Return the patch embeddings of the published towers: with bytes, with half of the patches dropped, with
    floats.
    """
    whole = [PatchShape(batch, 224, 224, patch_size, embed_dim) for patch_size, embed_dim in TOWERS]
    kept = [shape.changed(keep=shape.patches // 2) for shape in whole]
    return *whole, *kept, *(shape.changed(uint8=False) for shape in whole)


def _shipped(patch_size: int, dtypes: tuple[str, ...], *, uint8: bool = True, keep: int | None = None) -> Shipped:
    """Return a patch embedding of B's width to compile; class token and positions are parameters in float32."""
    label = f"P{patch_size} {'bytes' if uint8 else 'floats'}" + ("" if keep is None else f" keep{keep}")
    shape = PatchShape(2, 224, 224, patch_size, 768, uint8, keep)
    return Shipped(label, shape, dtypes, casts=PARAMETERS, tf32_by_triton_36=uint8)


BOTH = ("bf16", "fp32")
SHIPPED = (
    _shipped(14, BOTH),
    _shipped(16, (*BOTH, "fp16")),
    _shipped(32, BOTH),
    _shipped(16, BOTH, uint8=False),
    _shipped(16, ("bf16",), keep=98),
    _shipped(16, BOTH, uint8=False, keep=98),
)
LAID_OUT = (
    *(Tunable(f"patch_embed_{name}", f"_{name}_kernel", GemmConfig) for name in ("tokens", "weight_sums")),
    Tunable("patch_embed_rows", "_lay_out_kernel", RowConfig),
)
TARGETS = (
    Target("patch_embed", PatchShape(256, 224, 224, 14, 1024), LAID_OUT),
    # Tensor descriptors do not support a width of 1020, which is no multiple of 8, so kernels that gather pixels run.
    Target("patch_embed_gathered", PatchShape(256, 224, 224, 14, 1020), Tunable.named(GemmConfig, "patch_embed_fwd", "patch_embed_bwd_weight")),
    Target("patch_embed_kept", PatchShape(256, 224, 224, 16, 768, keep=98), Tunable.named(RowConfig, "patch_embed_bwd_pos")),
    Target("patch_embed_images", PatchShape(64, 224, 224, 14, 1024, False), Tunable.named(GemmConfig, "patch_embed_bwd_images")),
)  # fmt: skip
KERNELS = (
    *(f"_patch_embed_{name}_kernel" for name in ("fwd", "bwd_weight", "bwd_pos", "bwd_images")),
    "_token_of_position_kernel",
    "_fold_kernel",
    "_lay_out_kernel",
    "_tokens_kernel",
    "_weight_sums_kernel",
    "_unfold_grad_kernel",
)

SPECS = (
    OpSpec(
        op=patch_embed,
        reference=reference.patch_embed,
        make=make,
        cases=CASES,
        small=(TINY, TINY.changed(uint8=True), TINY.changed(keep=4)),
        category="patch, text input",
        kernels=KERNELS,
        suite="patch",
        floor=floor,
        bench={"cpu": _bench(16), "cuda": _bench(256)},
        items=("batch", "images"),
        shipped=SHIPPED,
        targets=TARGETS,
        small_tiles=small_tiles,
    ),
)
