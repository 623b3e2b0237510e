"""Samples in tar files: where each lies, and how it is read from there."""

import dataclasses
import functools
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from ..images import SampleError
from .formats import Extents, Format, extents
from .samples import RawSample, group_members
from .tar import BLOCK, MAX_MEMBER, Damage, Member, linked, pax_records, read_tar

MAX_HOPS = 8  # from one link to the next


def scan(file: BinaryIO, name: str = "") -> tuple[Extents, dict[str, int]]:
    """Return the extents of the samples of a tar file in blocks, and its damage, as :class:`Format` has it.

    Of a file that is whole and plain, only the headers are read.

    Raises:
        ValueError: it is not a tar file.
    """
    blocks: list[tuple[int, int]] = []  # the first, and how many
    damage: dict[str, int] = {}

    def watched(parts: Iterable[Member | Damage]) -> Iterator[Member | Damage]:
        for part in parts:
            if isinstance(part, Damage):
                damage.setdefault(f"byte {part.offset}: {part.reason}", 0)
            yield part

    plain = _plain_members(file)
    for sample in group_members(name, watched(read_tar(file)) if plain is None else plain):
        if "__damage__" in sample:
            damage[f"{sample['__key__'].partition(',')[0]}: {sample['__damage__']}"] += 1
        else:
            blocks.append(_blocks(*sample["__span__"]))
    return extents(*zip(*blocks, strict=True)) if blocks else extents((), ()), damage


def _blocks(begin: int, end: int) -> tuple[int, int]:
    """Return first block and number of blocks of an extent of bytes, which need not begin with a block."""
    return begin // BLOCK, -(-end // BLOCK) - begin // BLOCK


def _plain_members(file: BinaryIO) -> list[Member] | None:
    """Return the members of a tar file by its headers alone, without their data.

    It is None if there is anything in the file but plain members. The file is left at its beginning.
    """
    size = os.fstat(file.fileno()).st_size
    if size < BLOCK or size % BLOCK:
        return None
    parts, at = _plain(file, size, with_data=False)
    file.seek(at)
    rest = file.read(tarfile.RECORDSIZE + 2 * BLOCK + 1)
    file.seek(0)
    is_end = at + len(rest) == size and rest.count(0) == len(rest) >= 2 * BLOCK
    return parts if is_end else None


def _plain(file: BinaryIO, size: int, *, with_data: bool) -> tuple[list[Member], int]:
    """Return the plain members at the beginning of a file, and the place of the first byte that belongs to none.

    The file is not mapped into memory: if it is cut meanwhile, or cannot be read, the system would end the process.
    """
    parts: list[Member] = []
    at, start, extended = 0, 0, dict[str, str]()
    while len(header := _read(file, at, BLOCK)) == BLOCK:
        length, kind = _length(header), header[156]
        is_link = kind in b"12"
        if not header[0] or length is None or length > MAX_MEMBER or kind not in b"0\0x512":
            break
        length = 0 if is_link else length
        begin = at + BLOCK
        at = begin + -(-length // BLOCK) * BLOCK
        if kind == ord("x"):
            extended = pax_records(_read(file, begin, length))
            if "size" in extended or any(name.startswith("GNU.sparse") for name in extended):
                break
            continue
        if at > size:
            break
        if kind != ord("5"):
            data = _read(file, begin, length) if with_data else b""
            name, link = extended.get("path") or _name(header), ""
            if is_link:
                target = extended.get("linkpath") or _text(header[157:257])
                link = linked(name, target, is_symbolic=kind == ord("2"))
            parts.append(Member(name, data, start, at - start, link))
        start, extended = at, {}
    return parts, start


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _length(header: bytes) -> int | None:
    """Return the number of bytes behind a header; None if its checksum is wrong, or it is no size in octal digits."""
    try:
        stated = int(header[148:156].split(b"\0", 1)[0], 8)
        length = int(header[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        return None
    is_header = length >= 0 and sum(header) - sum(header[148:156]) + 8 * 32 == stated
    return length if is_header else None


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def parser(name: str, descriptor: int) -> Callable[[bytes], RawSample]:
    """Return a function that makes a sample of the bytes of its members: bytes by file extension."""
    follow = functools.cache(functools.partial(_places, descriptor))

    def content(member: Member, hops: int = MAX_HOPS) -> Member:
        """Return a member with the data of the file that it stands for."""
        if not member.link:
            return member
        extent = follow().get(member.link)
        if extent is None or not hops:
            why = "which is not in the shard" if extent is None else "and that to another, too many times"
            raise SampleError(f"{member.name} is a link to {member.link}, {why}", "broken link")
        (target,) = _members(os.pread(descriptor, extent[1], extent[0]))  # otherwise a ValueError: it was replaced
        return dataclasses.replace(member, data=content(target, hops - 1).data)

    def parse(data: bytes) -> RawSample:
        for sample in group_members(name, map(content, _members(data))):
            return sample
        raise ValueError("there is no sample")

    return parse


def _members(data: bytes) -> list[Member]:
    members, end = _plain(io.BytesIO(data), len(data), with_data=True)
    if end < len(data):
        members = [part for part in read_tar(io.BytesIO(data)) if isinstance(part, Member)]
    return members


def _places(descriptor: int) -> dict[str, tuple[int, int]]:
    """Return where each member of a tar file begins and how many bytes it takes, by its path."""
    # A forked data worker would share the place in a duplicated descriptor, and read elsewhere while another one reads.
    with open(f"/dev/fd/{descriptor}", "rb") as file:
        members = _plain_members(file) or (part for part in read_tar(file) if isinstance(part, Member))
        return {posixpath.normpath(member.name): (member.offset, member.size) for member in members}


TAR = Format(BLOCK, scan, parser)
