"""Samples in tar files: their positions, how they are read from there, and damage to the archive.

Python's tarfile stops silently at a header whose checksum is wrong, so half of a shard could be lost unnoticed. Here
every stretch of bytes that belongs to no member becomes a :class:`Damage`, and reading goes on at the next good header.
That header may be at any offset, since the length of garbage need not be a multiple of a block. It is recognised by its
checksum and by the word "ustar", which all current writers put there.
"""

import bisect
import functools
import io
import os
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from ..io.files import MAX_MEMBER
from ..models.images import SampleError
from .formats import Extents, Format, extents
from .samples import RawSample, is_pair

BLOCK = tarfile.BLOCKSIZE
MAGIC = b"ustar"
MAGIC_OFFSET = 257  # offset of the magic in a header
CHUNK = 1 << 20  # number of bytes that are searched for a header at once
MAX_DIGITS = 20  # largest number of digits of a number in a pax header; Python refuses to convert more than 4,300
MAX_HOPS = 8  # largest number of links that are followed one after another
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
GNU_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_DATA = (*LINKS, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
# An archive ends with two blocks of zeros, which most writers pad to a full record. More zeros are damage.
MAX_ZEROS = tarfile.RECORDSIZE + 2 * BLOCK
SMALLEST_PAIR = 4 * BLOCK  # least bytes of an image and a caption in a tar file, each with its header
NO_HEADER = "these bytes hold no valid header of a member"
MANY_ZEROS = "more zeros stand at the end than the end mark of a tar file has"
NO_END = "the file ends here, without the end mark of a tar file"


class Member(NamedTuple):
    """A file or link in the tar archive."""

    name: str
    data: bytes
    offset: int  # offset of its first header in the archive
    size: int  # bytes that it takes in the archive, with its headers
    link: str = ""  # for a link, the path of its target in the archive; a link has no data


class Damage(NamedTuple):
    """A damaged part of a tar archive: bytes that belong to no readable member."""

    offset: int  # offset of the first damaged byte
    size: int | None  # number of bytes; None if the loss is unknown: the archive is cut short, or ends at a huge member
    reason: str


class Header(NamedTuple):
    """The fields of a tar member's header."""

    name: str
    kind: bytes
    size: int
    target: str


def read_tar(file: BinaryIO, size: int, *, with_data: bool = False) -> Iterator[Member | Damage]:
    """Yield the files and links of a tar archive of ``size`` bytes, and its damaged parts.

    Without ``with_data``, only headers are read. Concatenated archives are read as one. The file is not memory-mapped:
    if it were truncated or unreadable meanwhile, the system would kill the process.

    Raises:
        ValueError: there is no header of a member in the whole file.
        OSError: the file cannot be read.
    """
    at = archive = 0
    is_found, is_ended, is_named = False, False, False
    while at < size:
        header = read_header(_read(file, at, BLOCK))
        if header is not None:
            is_found, is_ended, is_named = True, False, False
            part, at = _member(file, at, size, header, with_data=with_data)
            if part is not None:
                yield part
                is_named = isinstance(part, Damage)
            continue
        start, at = at, _after_zeros(file, at, size)
        zeros = at - start
        is_ended = is_ended or zeros > 0
        is_record = zeros == 2 * BLOCK or (zeros <= MAX_ZEROS and (at - archive) % tarfile.RECORDSIZE == 0)
        if zeros and ((at == size and zeros <= MAX_ZEROS) or (is_record and read_header(_read(file, at, BLOCK)))):
            archive = at  # here another archive begins, or the file ends
            continue
        only_zeros = at == size
        at = _next_header(file, at, size)
        is_named = at == size
        if only_zeros and is_found:
            yield Damage(start, None, MANY_ZEROS)
        elif at < size or is_found:
            yield Damage(start, at - start, NO_HEADER)
    if not (is_found or is_ended):
        raise ValueError(f"not a tar file: no valid header of a member in its {size} bytes")
    if not (is_named or is_ended):
        yield Damage(at, None, NO_END)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    """Read ``size`` bytes of a tar file from offset ``at``."""
    file.seek(at)
    return file.read(size)


def read_header(block: bytes) -> Header | None:
    """Parse the tar header in ``block``; None if its checksum or its length shows that it is no header."""
    try:
        stated = int(block[148:156].split(b"\0", 1)[0], 8)
        size = int(block[124:136].rstrip(b" \0") or b"0", 8)
    except ValueError:
        stated = size = -1
    if size < 0 or len(block) < BLOCK or sum(block) - sum(block[148:156]) + 8 * ord(" ") != stated:
        try:  # tarfile knows the other forms of numbers and checksums in headers
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return None
        return Header(header.name, header.type, header.size, header.linkname) if header.size >= 0 else None
    name, prefix = _text(block[:100]), _text(block[345:500])
    if prefix and block[257:263] == b"ustar\0":
        name = f"{prefix}/{name}"
    return Header(name, block[156:157], size, _text(block[157:257]))


def _text(field: bytes) -> str:
    """Return the text in a field of a tar header."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _member(
    file: BinaryIO, start: int, size: int, header: Header, *, with_data: bool
) -> tuple[Member | Damage | None, int]:
    """Read the tar member whose headers begin at ``start``; return it, its damage or None for a folder, and its end.

    Extended headers before the member's own header apply to it.
    """
    at, extended = start, dict[str, str]()
    while True:
        stated, name = extended.get("size", ""), extended.get("path") or header.name
        is_number = stated.isdecimal() and len(stated) <= MAX_DIGITS
        length = 0 if header.kind in WITHOUT_DATA else int(stated) if is_number else header.size
        begin = at + BLOCK
        if begin + length > size:
            return Damage(start, None, f"the file ends inside {name}"), size
        at = min(begin + length + -length % BLOCK, size)
        if length > MAX_MEMBER:
            return Damage(start, None, f"{name} has {length} bytes, more than the limit of {MAX_MEMBER}"), at
        if header.kind in PAX:
            extended |= pax_records(_read(file, begin, length))
        elif header.kind in GNU_LONG:
            extended[GNU_LONG[header.kind]] = _text(_read(file, begin, length))
        elif header.kind != tarfile.XGLTYPE:
            break
        following = read_header(_read(file, at, BLOCK))
        if following is None:
            return Damage(start, at - start, "the member of this extended header is missing"), at
        header = following
    if header.kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
        return Damage(start, None, f"{name} is a sparse file, which clipfast does not read"), at
    if header.kind in REGULAR:
        return Member(name, _read(file, begin, length) if with_data else b"", start, at - start), at
    if header.kind not in LINKS:
        return None, at
    # A symbolic link is relative to its own folder, and a hard link to the root of the archive.
    folder = posixpath.dirname(name) if header.kind == tarfile.SYMTYPE else ""
    target = posixpath.normpath(posixpath.join(folder, extended.get("linkpath") or header.target))
    return Member(name, b"", start, at - start, target), at


def pax_records(data: bytes) -> dict[str, str]:
    """Parse the records "length key=value" of a pax header in a tar shard, up to the first malformed one."""
    records, at = dict[str, str](), 0
    while at < len(data):
        length, _, _ = data[at : at + MAX_DIGITS + 1].partition(b" ")
        end = at + int(length) if length.isdigit() else at
        if not at < end <= len(data):
            break
        key, _, value = data[at + len(length) + 1 : end - 1].decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at = end
    return records


def _after_zeros(file: BinaryIO, at: int, size: int) -> int:
    """Return the offset of the first block of a tar file from ``at`` on that is not all zeros, or the end."""
    while (block := _read(file, at, BLOCK)) and not any(block):
        at += len(block)
    return min(at, size)


def _next_header(file: BinaryIO, at: int, size: int) -> int:
    """Search a tar file from ``at`` on for the next header; return its offset, or the end."""
    while data := _read(file, at, CHUNK):
        found = data.find(MAGIC, MAGIC_OFFSET)
        while found >= 0:
            start = found - MAGIC_OFFSET
            if read_header(data[start : start + BLOCK]) is not None:
                return at + start
            found = data.find(MAGIC, found + 1)
        if len(data) < CHUNK:
            break
        at += CHUNK - BLOCK + 1  # a header may begin in this chunk and end in the next one
    return size


def split_name(name: str) -> tuple[str, str] | None:
    """Split the name of a tar member into sample key and extension; None if the member belongs to no sample."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot or extension.startswith("__"):
        return None
    return folder + slash + stem, extension.lower()


def group_members(shard: str, members: Iterable[Member]) -> Iterator[tuple[RawSample, int, int]]:
    """Group the members of a tar shard into samples; yield each sample with its begin and its end in the shard."""
    sample: RawSample = {}
    begin = end = 0
    for member in members:
        named = split_name(member.name)
        if named is None:
            continue
        key, extension = named
        if key != sample.get("__key__") or extension in sample:
            if sample:
                yield sample, begin, end
            sample, begin = {"__key__": key, "__url__": shard}, member.offset
        sample[extension] = member.data
        end = member.offset + member.size
    if sample:
        yield sample, begin, end


def scan(file: BinaryIO, name: str = "") -> tuple[Extents, dict[str, int]]:
    """Return begin and length of each sample in a tar file, in blocks, and the losses, as ``Format.scan``.

    Only the headers are read.

    Raises:
        ValueError: it is not a tar file.
    """
    holes: list[Damage] = []

    def members() -> Iterator[Member]:
        """Yield the members of a tar shard, and note its damaged parts."""
        for part in read_tar(file, os.fstat(file.fileno()).st_size):
            if isinstance(part, Member):
                yield part
            else:
                holes.append(part)

    found = [(begin, end, is_pair(sample)) for sample, begin, end in group_members(name, members())]
    begins = [begin for begin, _, _ in found]
    smallest = min((end - begin for begin, end, is_whole in found if is_whole), default=SMALLEST_PAIR)
    damage = {}
    for hole in holes:
        after = bisect.bisect(begins, hole.offset)
        beside = found[max(after - 1, 0) : after + 1]
        if after and found[after - 1][1] > hole.offset:  # the damage is within a sample, not between two
            del beside[1:]
        cropped = sum(not is_whole for _, _, is_whole in beside)
        lost = ((hole.size or 0) - cropped * 2 * BLOCK) // smallest
        damage[f"byte {hole.offset}: {hole.reason}"] = max(lost, 0 if cropped else 1)
    first = [begin // BLOCK for begin in begins]  # rounded down, since a sample after damage may begin anywhere
    blocks = [-(-end // BLOCK) - place for place, (_, end, _) in zip(first, found, strict=True)]
    return extents(first, blocks), damage


def parser(name: str, descriptor: int) -> Callable[[bytes], RawSample]:
    """Return a function that makes a sample, bytes by file extension, from its extent in a tar file."""
    places = functools.cache(functools.partial(_places, descriptor))

    def content(member: Member, hops: int = MAX_HOPS) -> Member:
        """Return a link in a tar shard as a member with the data of its target."""
        if not member.link:
            return member
        extent = places().get(member.link)
        if extent is None or not hops:
            why = "which is not in the shard" if extent is None else "and that to another, too many times"
            raise SampleError(f"{member.name} is a link to {member.link}, {why}", "broken link")
        # If this raises a ValueError, the shard was replaced after its members were listed.
        (target,) = _members(os.pread(descriptor, extent[1], extent[0]))
        return member._replace(data=content(target, hops - 1).data)

    def parse(data: bytes) -> RawSample:
        """Return the sample in these bytes of a tar file."""
        for sample, _, _ in group_members(name, map(content, _members(data))):
            return sample
        raise ValueError("there is no sample")

    return parse


def _members(data: bytes) -> Iterator[Member]:
    """Yield the members in the bytes of a tar file."""
    return (part for part in read_tar(io.BytesIO(data), len(data), with_data=True) if isinstance(part, Member))


def _places(descriptor: int) -> dict[str, tuple[int, int]]:
    """Return begin and length in bytes of each member of a tar file by path, to follow links."""
    # The file is opened anew: forked data workers would share the offset of a duplicated descriptor, and disturb each
    # other's reads.
    with open(f"/dev/fd/{descriptor}", "rb") as file:
        members = (part for part in read_tar(file, os.fstat(descriptor).st_size) if isinstance(part, Member))
        return {posixpath.normpath(member.name): (member.offset, member.size) for member in members}


TAR = Format(BLOCK, scan, parser)
