"""Physical lines of a byte stream, with exact offsets, in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.errors import InputError

LINE_BYTES = 64 << 20
"""A longer line is refused where no smaller limit is set: a line without end must not fill the memory."""
_FIRST_BLOCK_BYTES = 64 << 10
_LAST_BLOCK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"


class ByteLines:
    """Read lines one by one and step back to any offset since the last mark.

    stream: anything with `read(size)`, standing at `offset`. limit: a line longer than this many bytes is cut there,
    so a caller sees `len(line) > limit` and may call `skip_line`. stop: where the caller expects to finish; beyond it
    only small blocks are read. Memory: what was read since the mark, plus two blocks.
    """

    def __init__(self, stream: BinaryIO, offset: int, limit: int, stop: int) -> None:
        self._stream, self._limit, self._stop = stream, limit, stop
        self._buffer = b""
        self._base = offset  # of the buffer's first byte
        self._at = self._mark = 0
        self._block_bytes = _FIRST_BLOCK_BYTES

    @property
    def offset(self) -> int:
        """Where the next line begins."""
        return self._base + self._at

    def next(self) -> bytes:
        """Return the next line with its newline (the last may have none), empty at the end of the stream."""
        at = self._at
        cut = self._buffer.find(b"\n", at)
        if cut < 0:
            return self._next_over_blocks()
        self._at = cut + 1
        return self._buffer[at : self._at]

    def _next_over_blocks(self) -> bytes:
        while True:
            searched = len(self._buffer) - self._at
            if searched > self._limit or not self._fill():
                stop = self._at + min(searched, self._limit + 1)
                break
            cut = self._buffer.find(b"\n", self._at + searched)
            if cut >= 0:
                stop = cut + 1
                break
        line = self._buffer[self._at : stop]
        self._at = stop
        return line

    def skip_line(self, stop: int | None = None) -> None:
        """Move past the end of the current line, however long; give up beyond `stop`."""
        while (cut := self._buffer.find(b"\n", self._at)) < 0:
            self._at = self._mark = len(self._buffer)
            if (stop is not None and self.offset >= stop) or not self._fill():
                return
        self._at = cut + 1

    def skip_bom(self) -> bytes:
        """Move past a UTF-8 byte order mark, if the stream begins with one; return its first two bytes."""
        while len(self._buffer) < len(BOM) and self._fill():
            pass
        self._at = len(BOM) if self._buffer.startswith(BOM) else 0
        return self._buffer[:2]

    def mark(self) -> int:
        """Remember this offset and return it: `rewind` and `marked` reach back to here."""
        self._mark = self._at
        return self._base + self._at

    def rewind(self, offset: int) -> None:
        """Step back to an offset at or after the mark."""
        self._at = offset - self._base

    def marked(self) -> bytes:
        """Return the bytes from the mark to here."""
        return self._buffer[self._mark : self._at]

    def _fill(self) -> bool:
        """Read a block more and drop what lies before the mark; False at the end of the stream."""
        wanted = min(self._block_bytes, max(self._stop - self._base - len(self._buffer), _FIRST_BLOCK_BYTES))
        block = self._stream.read(wanted)
        self._block_bytes = min(2 * self._block_bytes, _LAST_BLOCK_BYTES)
        self._buffer = self._buffer[self._mark :] + block
        self._base += self._mark
        self._at -= self._mark
        self._mark = 0
        return bool(block)


def text_lines(stream: BinaryIO, url: str, limit: int = LINE_BYTES) -> Iterator[str]:
    """Yield the lines of a UTF-8 stream, newline included, without a byte order mark. url: for the messages.

    Raises InputError, with the line, for one that is not UTF-8 or longer than `limit` bytes.
    """
    lines, number = ByteLines(stream, 0, limit, sys.maxsize), 0
    lines.skip_bom()
    while line := lines.next():
        number += 1
        where = f"{url}, line {number}"
        if len(line) > limit:
            raise InputError("the line is too long", where=where, expected=f"at most {limit:,} bytes")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text ({error})", where=where, expected="UTF-8") from error
        lines.mark()
