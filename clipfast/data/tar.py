"""Tar files read as a stream, member by member. Damage is reported, and reading goes on at the next good header.

Readers of the standard library end in silence at a header whose checksum is wrong, so that half of a shard can go
missing without a word. Here every stretch of bytes that belongs to no member becomes a :class:`Damage`.

Headers are parsed by ``tarfile``. After damaged bytes, a header is recognised by its checksum and by the word "ustar"
in it, which all current writers put there. It may stand anywhere, since garbage need not be a multiple of a block.
"""

import bz2
import dataclasses
import gzip
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from io import BufferedIOBase
from typing import IO, Protocol, cast

BLOCK = tarfile.BLOCKSIZE
MAGIC = b"ustar"
MAGIC_OFFSET = 257  # of the magic in a header
CHUNK = 1 << 20  # bytes that are read, and searched for a header, at once
MAX_MEMBER = 1 << 28  # bytes of the largest member that is read into memory
MAX_DIGITS = 20  # of the length of a record in a pax header
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
# An archive ends with two blocks of zeros, and most writers then fill a record. Other zeros are not an end but a hole.
MAX_ZEROS = tarfile.RECORDSIZE + 2 * BLOCK
COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], BufferedIOBase]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file), b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile
}  # fmt: skip
BZ2_ERROR = "Invalid data stream"  # of an OSError without a number, as errors of pipes are
BROKEN_COMPRESSION = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)


class Readable(Protocol):
    """A source of bytes that need not be seekable, such as a pipe."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes; none at the end."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in the archive."""

    name: str
    data: bytes
    offset: int  # of its first header in the (uncompressed) archive
    size: int  # bytes that it takes there, with its headers
    link: str = ""  # the path in the archive of the file that it stands for, if it is a link: it has no data then


@dataclasses.dataclass(frozen=True)
class Damage:
    """Bytes of the (uncompressed) archive that belong to no member that can be read."""

    offset: int  # of the first of them
    size: int | None  # how many, if that says how much is lost; None if the archive ends too early, or at a huge member
    reason: str


def read_tar(source: Readable) -> Iterator[Member | Damage]:
    """Yield the files and links of a tar archive, and what is damaged; gzip, bzip2 or xz may have compressed it.

    Several archives in one file, one behind the other, are read as one.

    Raises:
        ValueError: there is no header of a member in the whole file.
        OSError: the source cannot be read.
    """
    window = _Window(source)
    found, is_ended, is_said, start = False, False, False, 0
    while window.peek(BLOCK):
        header = _parse(window.peek(BLOCK))
        if header is not None:
            found, is_ended = True, False
            if (yield from _member(window, header)):
                return
            continue
        offset, zeros = window.offset, window.skip_zeros()
        is_ended = is_ended or zeros > 0
        is_record = zeros == 2 * BLOCK or (zeros <= MAX_ZEROS and (window.offset - start) % tarfile.RECORDSIZE == 0)
        if zeros and ((is_record and _parse(window.peek(BLOCK))) or (zeros <= MAX_ZEROS and not window.peek(1))):
            start = window.offset  # another archive begins here, or the file ends
            continue
        at_end = not window.peek(1)
        window.skip_to_header()
        is_said = not window.peek(1)  # the damage of the end
        if at_end and found:
            yield Damage(
                offset, None, f"{zeros} bytes of zeros stand at the end, more than the end mark of a tar file has"
            )
        elif window.peek(1) or found:
            yield Damage(offset, window.offset - offset, "these bytes hold no valid header of a member")
    if not found and not (is_ended and not window.error):
        raise ValueError(window.error or f"not a tar file: no valid header of a member in its {window.offset} bytes")
    if not is_said and (window.error or not is_ended):
        yield Damage(window.offset, None, window.error or "the file ends here, without the end mark of a tar file")


def is_compressed(start: bytes) -> bool:
    """Return True if a file that begins with these bytes is compressed; ``start`` has a block, or the whole file.

    The name of a member may begin like a compressed file.
    """
    return start.startswith(tuple(COMPRESSIONS)) and _parse(start[:BLOCK]) is None


def decompressed(source: Readable) -> Generator[bytes, None, str]:
    """Yield the bytes of a file, decompressed if it is compressed; return what is wrong with the compression, or ""."""
    window = _Window(source)
    while data := window.take(CHUNK):
        yield data
    return window.error


def _member(window: "_Window", header: tarfile.TarInfo) -> Generator[Member | Damage, None, bool]:
    """Yield the member that begins with ``header``, where the window stands; return True if the archive ends within it.

    Extended headers in front of the member's own apply to it.
    """
    start, extended = window.offset, dict[str, str]()
    while True:
        window.take(BLOCK)
        stated = extended.get("size", "")
        size = 0 if header.type in WITHOUT_DATA else int(stated) if stated.isdecimal() else header.size
        is_long = size > MAX_MEMBER
        data = b"" if is_long else window.take(size)
        missing = window.skip(size) if is_long else size - len(data)
        if missing:
            yield Damage(start, None, f"{window.error or 'the file ends'} inside {extended.get('path', header.name)}")
            return True
        window.take(-size % BLOCK)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= pax_records(data)
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            extended["linkpath"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type != tarfile.XGLTYPE:
            break
        following = _parse(window.peek(BLOCK))
        if following is None:
            yield Damage(start, window.offset - start, "the member of this extended header is missing")
            return False
        header = following
    name = extended.get("path", header.name)
    if is_long:
        yield Damage(start, None, f"{name} has {size} bytes, more than the limit of {MAX_MEMBER}")
    elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended):
        yield Damage(start, None, f"{name} is a sparse file, which clipfast does not read")
    elif header.isreg():
        yield Member(name, data, start, window.offset - start)
    elif header.type in LINKS:
        link = linked(name, extended.get("linkpath", header.linkname), is_symbolic=header.issym())
        yield Member(name, b"", start, window.offset - start, link)
    return False


def linked(name: str, target: str, *, is_symbolic: bool) -> str:
    """Return the path in the archive that a link means; one that begins with "/" or ".." leads out of it.

    A symbolic link begins where its own member stands, and a hard link where the archive does.
    """
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target) if is_symbolic else target)


def _parse(block: bytes) -> tarfile.TarInfo | None:
    """Return the header in ``block``, or None if it holds none: its checksum is wrong, or it is not whole."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def pax_records(data: bytes) -> dict[str, str]:
    """Return the records "length key=value" of a pax header, up to the first that is malformed."""
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


class _Window:
    """The bytes of a source, decompressed, of which those that come next can be looked at before they are taken.

    Attributes:
        offset: of the next byte.
        error: what is wrong with the compression, if the bytes end for that reason.
    """

    def __init__(self, source: Readable) -> None:
        self.offset, self.error = 0, ""
        self._read, self._held, self._at = source.read, b"", 0  # the next byte is _held[_at]
        start = self.peek(BLOCK)
        for magic, decompressed in COMPRESSIONS.items() if is_compressed(start) else ():
            if start.startswith(magic):
                # read1 returns the bytes before an error, which read would lose.
                self._read = decompressed(cast(IO[bytes], _Joined(self._held, source))).read1
                self._held = b""

    def peek(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or fewer at the end."""
        if len(self._held) - self._at < size:
            parts = [self._held[self._at :]]
            missing = size - len(parts[0])
            while missing > 0 and (more := self._pull(max(missing, CHUNK))):
                parts.append(more)
                missing -= len(more)
            self._held, self._at = b"".join(parts), 0
        return self._held[self._at : self._at + size]

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes, or fewer at the end, and pass over them."""
        data = self.peek(size)
        self._at += len(data)
        self.offset += len(data)
        return data

    def skip(self, size: int) -> int:
        """Pass over ``size`` bytes, and return how many of them were missing."""
        while size and (taken := len(self.take(min(size, CHUNK)))):
            size -= taken
        return size

    def skip_zeros(self) -> int:
        """Pass over blocks of zeros and return how many bytes these were."""
        start = self.offset
        while (block := self.peek(BLOCK)) and not any(block):
            self.take(BLOCK)
        return self.offset - start

    def skip_to_header(self) -> None:
        """Pass over all bytes before the next header, or the end."""
        while data := self.peek(CHUNK):
            at = data.find(MAGIC, MAGIC_OFFSET)
            while at >= 0:
                start = at - MAGIC_OFFSET
                if _parse(data[start : start + BLOCK]) is not None:
                    self.take(start)
                    return
                at = data.find(MAGIC, at + 1)
            # A header may begin in the last block and end in the next window.
            self.take(len(data) - BLOCK + 1 if len(data) == CHUNK else len(data))

    def _pull(self, size: int) -> bytes:
        if self.error:
            return b""
        try:
            return self._read(size)
        except BROKEN_COMPRESSION as error:
            self.error = f"its compression is broken: {error}"
        except OSError as error:
            if str(error) != BZ2_ERROR:
                raise
            self.error = f"its compression is broken: {error}"
        return b""


class _Joined:
    """Bytes that were read already, and then the rest of their source."""

    def __init__(self, start: bytes, rest: Readable) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1, /) -> bytes:
        """Return up to ``size`` bytes; none at the end."""
        end = len(self._start) if size < 0 else size
        data, self._start = self._start[:end], self._start[end:]
        return data or self._rest.read(size)
