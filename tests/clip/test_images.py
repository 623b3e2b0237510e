"""Images that nobody has checked: handled as they should be, or refused with the reason."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast import ImageError, create_model_and_transforms, image_transform, open_image
from clipfast.images import make_transform
from clipfast.kernels.reference import CLIP_MEAN, CLIP_STD


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """A picture in which every pixel says where it is."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).round().astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of any size, with next to no pixels: a decompression bomb."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000)))


def damaged(content: bytes) -> bytes:
    """``content`` with other bytes in the middle."""
    middle = len(content) // 2
    return content[:middle] + b"\xff" * 20 + content[middle + 20 :]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats(kind):
    image = open_image(encoded(gradient(), kind))
    assert image.mode == "RGB"
    assert image.size == (40, 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an image at all", "not an image in one of the formats JPEG, PNG"),
        (b"", "the image has no bytes"),
        ("nothing.png", "No such file"),
        (encoded(gradient(400, 300))[:1000], "cannot be decoded: .*truncated"),
        (encoded(gradient(400, 300), "JPEG")[:3000], "cannot be decoded: image file is truncated"),
        (encoded(gradient(), "TIFF"), "not an image in one of the formats"),
        (png_header(20000, 20000), "20000x20000 pixels, more than the limit|exceeds limit"),
        (png_header(9500, 9500), "9500x9500 pixels, more than the limit of 89478485"),
        (png_header(1, 65000), "1x65000 pixels, its sides differ more than 200 times"),
        (damaged(encoded(gradient(400, 300))), "cannot be decoded"),
    ],
    ids=["text", "empty", "missing", "cut png", "cut jpeg", "tiff", "bomb", "large", "long", "broken"],
)
def test_refused(content, message):
    with pytest.raises(ImageError, match=message):
        open_image(content)


def test_limit_can_be_lowered():
    with pytest.raises(ImageError, match="40x30 pixels, more than the limit of 1000"):
        open_image(encoded(gradient()), max_pixels=1000)


def test_palette_and_cmyk_and_grey():
    exact = np.asarray(gradient()).astype(int)
    assert open_image(encoded(gradient().convert("P"))).mode == "RGB"
    cmyk = np.asarray(open_image(encoded(gradient().convert("CMYK"), "JPEG", quality=95))).astype(int)
    assert abs(cmyk - exact).mean() < 5
    grey = np.asarray(open_image(encoded(gradient().convert("L"))))
    assert (grey[..., 0] == grey[..., 2]).all()
    assert image_transform(32, False)(gradient().convert("LA")).shape == (3, 32, 32)


def test_sixteen_bits_are_scaled():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    pixels = np.asarray(open_image(encoded(Image.fromarray(ramp))))[0, :, 0].astype(int)
    assert abs(pixels - np.arange(256)).max() <= 1


def test_exif_orientation_is_applied():
    image = gradient()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    upright = open_image(encoded(image, "PNG", exif=exif))
    assert upright.size == (30, 40)
    assert np.array_equal(np.asarray(upright), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(content).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (500, 333), (7, 90)])
def test_same_pixels_as_open_clip(size):
    open_clip = pytest.importorskip("open_clip")
    image = gradient(*size)
    theirs = open_clip.image_transform(32, is_train=False)(image)
    torch.testing.assert_close(image_transform(32, False)(image), theirs, rtol=1e-6, atol=1e-6)


def test_bytes_are_the_floats_before_normalisation():
    image = gradient()
    floats, ints = image_transform(32, False)(image), image_transform(32, False, uint8=True)(image)
    assert ints.dtype == torch.uint8
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close((ints / 255 - mean) / std, floats)


def test_training_crops_differ_and_evaluation_does_not():
    _, train, evaluate = create_model_and_transforms("ViT-T-8-32", uint8=True)
    image = gradient()
    assert train(image).shape == evaluate(image).shape == (3, 32, 32)
    assert not torch.equal(train(image), train(image))
    assert torch.equal(evaluate(image), evaluate(image))
    without_crop = make_transform(32, train=True, scale=(1.0, 1.0), uint8=True)
    assert torch.equal(without_crop(image), evaluate(image))


def test_broken_files_raise_nothing_else():
    # Decoders of broken files raise all sorts of things; a data worker must not die of them.
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    for kind in ("JPEG", "WEBP", "PNG"):
        content = np.frombuffer(encoded(gradient(), kind, exif=exif), np.uint8)
        for _ in range(1500):
            broken = content.copy()
            places = rng.integers(0, len(content), 3)
            broken[places] = rng.integers(0, 256, 3)
            with contextlib.suppress(ImageError):
                assert open_image(broken.tobytes()).mode == "RGB"
