"""JPEG decoding on the device that trains: data workers only check the files and choose the crops.

A worker sends the files that the device can certainly decode, and decodes all others itself. The check is cheap: in a
baseline file with one scan, libjpeg raises errors only for the headers before the scan and for a missing end; for
anything wrong within the scan, it gives at most a warning. The worker therefore decodes the file without its scan, at
an eighth of its size, and looks for the marker that ends the scan. In this way the worker finds every file that cannot
be used, and takes another sample for it. If only the device refuses a file, the host decodes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.images import ImageError, open_image, opened
from .crops import ORIENTATION, UPRIGHT, CroppedImages

log = logging.getLogger("clipfast")

START, SCAN, END = b"\xff\xd8", 0xDA, b"\xff\xd9"
OTHER_FRAMES = frozenset(range(0xC1, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers C4, C8 and CC begin no frame
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # any marker of JPEG but an escaped byte 255 and a restart
MAX_PIXELS = 1 << 26  # the most pixels of images that are decoded together: 192 MiB


class EncodedCrop(NamedTuple):
    """A JPEG file, the size of its image, and the crop: left, top, right, bottom."""

    data: bytes
    width: int
    height: int
    box: tuple[int, int, int, int]


class EncodedCrops:
    """Turns the bytes of an image into a crop to decode on the device, with the same random numbers as ``crops``.

    For images that are not upright RGB images in baseline JPEG, it returns the decoded crop, as ``crops`` does.
    """

    def __init__(self, crops: CroppedImages) -> None:
        self.crops = crops

    def __call__(self, data: bytes) -> EncodedCrop | Tensor:
        """Return the file and its crop, or the pixels of the crop.

        Raises:
            ImageError: the image cannot be used.
        """
        found = decodable(data)
        if found is None or found[1] * found[2] > self.crops.max_pixels:
            return self.crops(data)
        file, width, height = found
        left, top, right, bottom = map(int, self.crops.box(width, height))
        return EncodedCrop(file, width, height, (left, top, right, bottom))

    def gathered(self, crops: Iterable[EncodedCrop | Tensor], count: int) -> EncodedImages:  # noqa: ARG002
        """Collect the crops of a batch: undecoded files, and pixels that were decoded already."""
        files, pixels, places = [], [], ([], [])  # type: ignore[var-annotated]
        for place, crop in enumerate(crops):
            is_pixels = isinstance(crop, Tensor)
            (pixels if is_pixels else files).append(crop)
            places[is_pixels].append(place)
        size = self.crops.image_size
        joined = np.frombuffer(b"".join(file.data for file in files) or b"\0", np.uint8)
        numbers = [(len(file.data), file.width * file.height, *file.box) for file in files]
        return EncodedImages(
            size,
            torch.from_numpy(joined.copy()),
            torch.tensor(numbers, dtype=torch.int64).reshape(-1, 6),
            torch.tensor(places[0], dtype=torch.int64),
            torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8),
            torch.tensor(places[1], dtype=torch.int64),
        )


def decodable(data: bytes) -> tuple[bytes, int, int] | None:
    """Return a JPEG file that the device can decode, cut at its end marker, and width and height of its image.

    Return None if the file is no baseline JPEG with one scan, is not an upright RGB image, or is broken.
    """
    scan = _scan(data)
    if scan is None:
        return None
    end = MARKER_IN_SCAN.search(data, scan)
    if end is None or end[0] != END:
        return None
    with contextlib.suppress(ImageError), opened(io.BytesIO(data[:scan] + END)) as image:
        is_plain = image.format == "JPEG" and image.mode == "RGB" and image.info.get("adobe_transform", 1) == 1
        if is_plain and image.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT:
            width, height = image.size
            image.draft("RGB", (-(-width // 8), -(-height // 8)))
            image.load()  # loading raises the errors that libjpeg would raise for the whole file
            return data[: end.end()], width, height
    return None


def _scan(data: bytes) -> int | None:
    """Return the offset of the scan's data in a baseline JPEG file; None if the file is not baseline JPEG."""
    at = len(START)
    if not data.startswith(START):
        return None
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in OTHER_FRAMES:
            return None
        at += 2 + length
        if marker == SCAN:
            return at
    return None


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The images of a batch, most of which are still JPEG files to decode on the device.

    Attributes:
        image_size: side of the images in pixels.
        files: the concatenated bytes of all JPEG files: uint8.
        numbers: int64 [F, 6], for each file its length, its number of pixels, and left, top, right and bottom of its
            crop.
        places: indices of the files' images in the batch: int64 [F].
        pixels: the images that were decoded already: uint8 [P, 3, S, S].
        pixel_places: indices of these images in the batch: int64 [P].
    """

    image_size: int
    files: Tensor
    numbers: Tensor
    places: Tensor
    pixels: Tensor
    pixel_places: Tensor

    def __len__(self) -> int:
        return len(self.places) + len(self.pixel_places)

    def pin_memory(self) -> EncodedImages:
        """Return the images with their pixels in pinned memory; the decoder takes files from any memory."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())

    def on(self, device: torch.device) -> Tensor:
        """Decode the JPEG files on ``device``, and return all crops: uint8 [B, 3, S, S].

        Raises:
            ImageError: neither the device nor the host can decode a file. A worker should have replaced it.
        """
        size = self.image_size
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8, device=device)
        images.index_copy_(
            0, self.pixel_places.to(device, non_blocking=True), self.pixels.to(device, non_blocking=True)
        )
        for first, stop in self._parts():
            boxes, places = self.numbers[first:stop, 2:].tolist(), self.places[first:stop].tolist()
            for image, box, place in zip(decoded(self._files(first, stop), device), boxes, places, strict=True):
                left, top, right, bottom = box
                images[place].copy_(_resized(image[:, top:bottom, left:right], size))
        return images

    def _files(self, first: int, stop: int) -> list[Tensor]:
        """Return the bytes of the JPEG files ``first`` to ``stop - 1`` of a batch."""
        ends = self.numbers[:stop, 0].cumsum(0).tolist()
        begins = [0, *ends]
        return [self.files[begins[index] : ends[index]] for index in range(first, stop)]

    def _parts(self) -> Iterator[tuple[int, int]]:
        """Split the JPEG files into parts that are decoded together; yield begin and end index of each part."""
        first, pixels = 0, 0
        for index, count in enumerate(self.numbers[:, 1].tolist()):
            if pixels and pixels + count > MAX_PIXELS:
                yield first, index
                first, pixels = index, 0
            pixels += count
        if pixels:
            yield first, len(self.numbers)


def _resized(image: Tensor, size: int) -> Tensor:
    """Resize a decoded image [3, H, W] to ``size`` pixels a side, bicubic with antialiasing; floats from 0 to 255."""
    resized = F.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True)[0]
    return resized.round_().clamp_(0, 255)


def decoded(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEG files on ``device``: uint8, [3, H, W] each. The host decodes those that the device refuses.

    Raises:
        ImageError: neither can decode a file.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        images: list[Tensor] = decode_jpeg(files, ImageReadMode.RGB, device)
        return images
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the error does not say which file is the reason, so each half is tried by itself
        half = len(files) // 2
        if half:
            return decoded(files[:half], device) + decoded(files[half:], device)
        _warn_once(str(device), str(error).splitlines()[0])
        pixels = np.array(open_image(files[0].numpy().tobytes()))
        return [torch.from_numpy(pixels).permute(2, 0, 1).to(device)]


@functools.cache
def _warn_once(device: str, reason: str) -> None:
    """Warn, once for each reason, that a device refuses JPEG files of the training data."""
    log.warning(f"{device} refuses JPEG files that the host decodes in its place: {reason}")


def check_decoder(device: torch.device) -> None:
    """Decode a small JPEG file on ``device``, to see whether it can decode.

    Raises:
        ValueError: the device cannot decode JPEG files.
    """
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    try:
        decode_jpeg([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], ImageReadMode.RGB, device)
    except RuntimeError as error:
        raise ValueError(
            f"--decode-on-device: torchvision cannot decode JPEG files on {device}: {str(error).splitlines()[0]}"
        ) from error
