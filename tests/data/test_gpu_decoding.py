"""JPEG decoding on the device: crops equal to those of the host, nearly equal pixels, and handling of broken files."""

import dataclasses
import io
import math
from unittest import mock

import numpy as np
import pytest
import torch

from clipfast.data import CroppedImages, EncodedCrops, PairBatches, encoded, pair_loader
from clipfast.data.encoded import EncodedCrop, check_decoder, decodable
from clipfast.models.images import ImageError, open_image
from clipfast.models.tokenizer import Tokenizer
from clipfast.train.loop import train

from ..models.test_images import decibels, exif_of, jpeg, photograph
from ..small_runs import picture, sample, write_shard
from ..train.test_training import config
from .conftest import opened, ordered

CPU = torch.device("cpu")


def cropped(crops, files):
    """Yield a random crop of each JPEG file, drawn with the file's number as seed."""
    for number, data in enumerate(files):
        torch.manual_seed(number)
        yield crops(data)


def batch_of(files, size=96, **options):
    """Return a batch of undecoded JPEG files, which the device will decode and crop."""
    crops = EncodedCrops(CroppedImages(size, **options))
    return crops.gathered(list(cropped(crops, files)), len(files))


def usual(files, size=96, **options):
    """Return the crops that the host makes of JPEG files with Pillow, to compare them with the device's."""
    return torch.stack(list(cropped(CroppedImages(size, **options), files)))


def kind_of(data):
    """Return None for an image file that the device decodes, and else the shape of the host's crop."""
    found = EncodedCrops(CroppedImages(16))(data)
    return None if isinstance(found, EncodedCrop) else tuple(found.shape)


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.2, 0.5)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_pixels_are_nearly_those_of_the_host(scale, subsampling):
    sizes = [(512, 512), (640, 427), (333, 501), (97, 101), (40, 30)]
    files = [jpeg(photograph(*size, seed=n), subsampling=subsampling) for n, size in enumerate(sizes)]
    batch = batch_of(files, scale=scale)
    assert (len(batch), len(batch.places), len(batch.pixels)) == (5, 5, 0)
    found = batch.on(CPU)
    assert (found.shape, found.dtype) == ((5, 3, 96, 96), torch.uint8)
    whole, coarse = usual(files, scale=scale, oversampling=math.inf), usual(files, scale=scale)
    for ours, exact, usually in zip(found, whole, coarse, strict=True):
        assert decibels(ours, exact) > 43  # pixels at the edges differ, since Pillow reads pixels beyond the crop
        assert decibels(ours, usually) > 35  # the host decodes this image at a fraction of its size


def test_what_the_device_gets():
    image = photograph(120, 90)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    plain = jpeg(image)
    assert kind_of(plain) is None
    assert kind_of(jpeg(image, exif=exif_of(1))) is None
    assert kind_of(jpeg(image, restart_marker_rows=1)) is None
    # bytes after the end marker are not sent
    assert decodable(plain + b"\xff\xd8 and more") == (plain, 120, 90)
    for others in (
        stream.getvalue(), picture(0), jpeg(image, exif=exif_of(6)), jpeg(image, progressive=True),
        jpeg(image.convert("L")), jpeg(image.convert("CMYK")), jpeg(image, keep_rgb=True),
    ):  # fmt: skip
        assert kind_of(others) == (3, 16, 16)
    mixed = [stream.getvalue(), plain, jpeg(image.convert("L")), plain, jpeg(image, exif=exif_of(6))]
    batch = batch_of(mixed)
    assert (batch.places.tolist(), batch.pixel_places.tolist()) == ([1, 3], [0, 2, 4])
    found, expected = batch.on(CPU), usual(mixed)
    assert torch.equal(found[[0, 2, 4]], expected[[0, 2, 4]])
    assert all(decibels(found[place], expected[place]) > 35 for place in (1, 3))
    assert torch.equal(batch_of(mixed[:1]).on(CPU), expected[:1])  # this batch has only images that the host decodes


def damaged(data, rng):
    """Return a JPEG file with a few wrong, missing or doubled bytes."""
    content = bytearray(data)
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match rng.integers(5):
        case 0:
            content[at : at + length] = rng.bytes(len(content[at : at + length]))
        case 1:
            del content[at : at + length]
        case 2:
            del content[at:]
        case 3:
            content[at:at] = content[at : at + length]
        case 4:  # damage the header: it is small, and many things in it can be wrong
            content[int(rng.integers(700)) % len(data)] = int(rng.integers(256))
    return bytes(content)


def outcome(function, data):
    """Return the image that a decoder makes of a file, or the kind of its error."""
    try:
        return function(data), None
    except ImageError as error:
        return None, error.kind


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"restart_marker_rows": 1}])
def test_workers_refuse_what_the_host_refuses(options):
    """Data workers refuse damaged JPEG files without decoding them, and with the same kinds of errors as the host."""
    whole, rng = jpeg(photograph(70, 50), **options), np.random.default_rng(0)
    sent = refused = 0
    for _ in range(500):
        data = damaged(whole, rng)
        (image, kind), (crop, kind_here) = outcome(open_image, data), outcome(EncodedCrops(CroppedImages(16)), data)
        assert kind == kind_here
        refused += kind is not None
        if isinstance(crop, EncodedCrop):
            sent += 1
            assert (crop.width, crop.height) == image.size
            (pixels,) = encoded.decoded([torch.frombuffer(bytearray(crop.data), dtype=torch.uint8)], CPU)
            assert pixels.shape == (3, crop.height, crop.width)
    assert sent > 70
    assert refused > 35


def refusing(*refused):
    """Let torchvision's JPEG decoder refuse every list with one of the files ``refused``, as nvJPEG does."""
    from torchvision.io import decode_jpeg

    def decode(files, *arguments):
        """Raise nvJPEG's error if one of the JPEG files is to be refused, else decode them all."""
        if any(bytes(file.numpy()) in refused for file in files):
            raise RuntimeError("nvjpegDecode failed: 5\nat some line")
        return decode_jpeg(files, *arguments)

    return mock.patch("torchvision.io.decode_jpeg", decode)


def test_the_host_decodes_what_the_device_refuses(caplog):
    encoded._warn_once.cache_clear()
    files = [jpeg(photograph(60 + n, 50, seed=n)) for n in range(11)]
    expected = batch_of(files).on(CPU)
    with refusing(files[3], files[10]):
        found = batch_of(files).on(CPU)
    assert all(decibels(ours, theirs) > 45 for ours, theirs in zip(found, expected, strict=True))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)].count(True) >= 9
    assert len(caplog.records) == 1
    with (
        mock.patch("torchvision.io.decode_jpeg", side_effect=torch.OutOfMemoryError("full")),
        pytest.raises(torch.OutOfMemoryError),  # a lack of memory must not be taken for a refused file
    ):
        batch_of(files).on(CPU)


def test_a_device_without_a_decoder():
    check_decoder(CPU)
    with (
        mock.patch("torchvision.io.decode_jpeg", side_effect=RuntimeError("not compiled with nvJPEG support")),
        pytest.raises(ValueError, match="--decode-on-device: torchvision cannot decode JPEG files on cpu"),
    ):
        check_decoder(CPU)


@pytest.fixture
def photographs(tmp_path):
    """Write a shard of 32 photographs; some are PNG files, and two are broken."""
    samples = []
    for number in range(32):
        data = jpeg(photograph(48 + number, 40, seed=number))
        data = {5: data[: len(data) // 2], 17: b"nothing"}.get(number, data)
        samples.append(sample(number) if number % 8 == 2 else {"jpg": data, "txt": f"photograph {number}".encode()})
    return str(write_shard(tmp_path / "p.tar", samples))


def test_batches_are_the_same_pairs(photographs):
    source, crops = opened(photographs), CroppedImages(32)
    usually = PairBatches([source], ordered(source), crops, Tokenizer(16), 8, 3)
    ours = dataclasses.replace(usually, transform=EncodedCrops(crops), gather=EncodedCrops(crops).gathered)
    skipped = 0
    for one, other in zip(pair_loader(usually, 0, 5, 0), pair_loader(ours, 0, 5, 2), strict=True):
        assert len(one) == len(other) == 8
        assert torch.equal(one.texts, other.texts)
        assert one.skipped == other.skipped
        skipped += len(one.skipped)
        assert decibels(one.images, other.images.on(CPU)) > 35
    assert skipped >= 2


def test_a_run_names_broken_photographs(photographs, tmp_path):
    options = {"unique_by": None, "epochs": 1, "max_bad_fraction": 0.2, "decode_on_device": True}
    folder, _ = train(config(photographs, tmp_path, **options))
    assert (folder.path / "skipped.tsv").read_text().count("p.tar/") == 2


@pytest.mark.parametrize(
    ("options", "flags"),
    [({"hue": 0.1, "affine": 0.1}, "--affine, --hue"), ({"crop_scale": (1, 1)}, "--crop-scale 1 1")],
)
def test_flags_that_it_cannot_be_used_with(options, flags):
    with pytest.raises(ValueError, match=f"--decode-on-device cannot be used with {flags}"):
        config("x.tar", "runs", decode_on_device=True, **options)
