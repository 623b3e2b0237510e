"""Tar shards of samples that are chosen from any source."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import sync, write_folder
from ..images import SampleError
from ..kernels.common import slices

if TYPE_CHECKING:
    from .samples import Samples

SHARD_SIZE = 10_000  # samples of a shard


def write_shards(
    folder: Path, samples: Samples, numbers: Sequence[int], *, shard_size: int = SHARD_SIZE,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:  # fmt: skip
    """Copy samples, file by file as they are, to tar shards 00000.tar, 00001.tar and so on in a new folder.

    A sample is called by its number in the source, since keys of several shards may be the same. The folder appears as
    a whole.

    Args:
        folder: to make.
        samples: the source.
        numbers: of the samples.
        shard_size: samples of a shard.
        advance: is called with 1 after each sample.

    Returns:
        A sentence for each sample that cannot be read any more.

    Raises:
        FileExistsError: there is something at ``folder``.
        DiskFullError: there is no space.
    """
    lost: list[str] = []

    def write(path: Path) -> None:
        for shard, rows in enumerate(slices(len(numbers), shard_size)):
            with tarfile.open(path / f"{shard:05}.tar", "w") as tar:
                for number in numbers[rows]:
                    try:
                        _add(tar, number, samples.files(number))
                    except SampleError as error:
                        lost.append(f"sample {number}: {error}")
                    advance(1)
            sync(path / f"{shard:05}.tar")

    write_folder(folder, write)
    return lost


def _add(tar: tarfile.TarFile, number: int, files: dict[str, bytes]) -> None:
    for extension, data in files.items():
        info = tarfile.TarInfo(f"{number:09}.{extension}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
