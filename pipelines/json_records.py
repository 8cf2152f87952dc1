"""Read JSON objects one at a time, whether a file is one array or a line each; write files whole.

Which of the two it is, the content decides: DPR and FiD write one array of any size, PAQ writes lines. All may be
compressed, and none fits in memory for sure.
"""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pipelines.errors import ConfigError, InputError, StorageError

_CHUNK = 1 << 20  # bytes
_LONGEST = 1 << 26  # characters of one object; beyond it the file is broken rather than large
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

DAMAGED = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, EOFError)
"""What the decompressors behind `open_bytes` raise for a file that is damaged, cut short or not theirs."""


def read_records(url: str, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("<url>, line <n>", object) for each object, from a path or any fsspec URL. expected: for the messages.

    Raises InputError, naming the line, for a missing, empty, damaged or malformed file; StorageError when the store
    cannot be reached. Memory: a few times the longest object, which may have 64 Mi characters.
    """
    found = False
    try:
        with open_bytes(url) as stream:
            for number, record in _records(stream, url, expected):
                where = f"{url}, line {number}"
                if not isinstance(record, dict):
                    what = f"the record is a JSON {type(record).__name__}, not an object"
                    raise InputError(what, where=where, expected=expected)
                found = True
                yield where, record
    except (FileNotFoundError, IsADirectoryError) as error:
        hint = "check the path and, for a remote store, the bucket and prefix"
        raise InputError("there is no such file", where=url, expected=expected, hint=hint) from error
    except DAMAGED as error:
        hint = "fetch the file again; its name must end in what it is compressed with"
        raise InputError(f"the file cannot be decompressed ({error})", where=url, hint=hint) from error
    except (ValueError, ImportError) as error:  # an unknown protocol, or its driver is not installed
        raise InputError(f"the URL cannot be opened ({error})", where=url, expected="a path or a URL") from error
    except OSError as error:
        hint = "check access to the store and run it again"
        raise StorageError(f"the file cannot be read ({error})", where=url, hint=hint) from error
    if not found:
        raise InputError("the file holds no records", where=url, expected=expected)


def open_bytes(url: str) -> Any:
    """Return a context of the bytes at a path or any fsspec URL, decompressed as the name says. May raise DAMAGED."""
    import fsspec

    if str(url).lower().endswith(".zst"):  # fsspec knows it only with another package
        from pipelines.readers.files import open_text

        return open_text(url)
    return fsspec.open(url, "rb", compression="infer")


def put_whole(url: str, fill: Callable[[BinaryIO], None]) -> None:
    """Fill a file at a path or any fsspec URL, compressed as its name says, whole or not at all."""
    from pipelines.storage import Store, temporary_file

    folder, slash, name = str(url).rpartition("/")
    if folder.endswith(":/"):
        raise ConfigError("the URL names no folder", where=url, expected="a file in a folder, or in a bucket")
    store = Store(folder or ("/." if slash else "."))
    if store.is_local:
        os.makedirs(store.root, exist_ok=True)
    with temporary_file(store.root if store.is_local else None) as temp:
        with _compressing(temp, name) as stream:
            fill(stream)
        store.put_file(name, temp)


def _compressing(path: str, name: str) -> Any:
    import fsspec

    if name.lower().endswith(".zst"):
        import pyarrow as pa

        return pa.CompressedOutputStream(path, "zstd")
    return fsspec.open(path, "wb", compression=fsspec.utils.infer_compression(name))


def _records(stream: BinaryIO, url: str, expected: str) -> Iterator[tuple[int, Any]]:
    text = _Text(stream, url, expected)
    text.skip_space()
    if text.peek() == "[":
        yield from _array(text)
        return
    while text.peek():
        yield text.line, text.value(whole_line=True)
        text.skip_space()


def _array(text: _Text) -> Iterator[tuple[int, Any]]:
    text.take("[")
    text.skip_space()
    while text.peek() != "]":
        yield text.line, text.value()
        text.skip_space()
        if text.peek() != "]":
            text.take(",")
            text.skip_space()
    text.take("]")
    text.skip_space()
    if text.peek():
        raise text.error("text after the end of the array")


class _Text:
    """The decoded rest of a stream: what was read and not yet parsed. line: of its first character, from 1."""

    def __init__(self, stream: BinaryIO, url: str, expected: str) -> None:
        self.stream, self.url, self.expected = stream, url, expected
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.line, self.ended = "", 0, 1, False

    def error(self, what: str, line: int | None = None) -> InputError:
        return InputError(what, where=f"{self.url}, line {line or self.line}", expected=self.expected)

    def more(self, size: int = _CHUNK) -> None:
        """Read on; drop what is parsed."""
        data = self.stream.read(size)
        self.ended = not data
        self.buffer, self.at = self.buffer[self.at :], 0
        try:
            self.buffer += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.buffer.count("\n") + data.count(b"\n", 0, error.start)
            raise InputError(f"not UTF-8 text ({error})", where=f"{self.url}, line {line}", expected="UTF-8") from error

    def peek(self) -> str:
        """Return the next character, "" at the end."""
        while self.at == len(self.buffer) and not self.ended:
            self.more()
        return self.buffer[self.at : self.at + 1]

    def skip_space(self) -> None:
        while self.peek() in (" ", "\t", "\n", "\r"):
            found = _SPACE.match(self.buffer, self.at)
            self._advance(found.end() if found else self.at + 1)

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"not JSON: {character!r} is missing")
        self.at += 1

    def value(self, *, whole_line: bool = False) -> Any:
        """Parse one value; read on while it is incomplete. whole_line: it ends with its line."""
        while True:
            end = self.buffer.find("\n", self.at) if whole_line else -1
            end = len(self.buffer) if end < 0 else end
            size = end - self.at
            if not whole_line or (size <= _LONGEST and (end < len(self.buffer) or self.ended)):
                try:
                    return self._parse(end, whole_line)
                except json.JSONDecodeError as error:
                    if whole_line or self.ended:
                        line = self.line + self.buffer.count("\n", self.at, error.pos)
                        raise self.error(f"not JSON ({error.msg})", line) from error
                except (ValueError, RecursionError) as error:  # ValueError: an endless number
                    told = error if isinstance(error, ValueError) else "nested too deeply"
                    raise self.error(f"not JSON ({told})") from error
            if size > _LONGEST:
                raise self.error(f"one record is longer than {_LONGEST:,} characters")
            self.more(max(_CHUNK, min(size, _LONGEST - size + 1)))

    def _parse(self, end: int, whole_line: bool) -> Any:
        if not whole_line:
            value, stop = _DECODER.raw_decode(self.buffer, self.at)
        else:
            value, stop = json.loads(self.buffer[self.at : end]), end
        self._advance(stop)
        return value

    def _advance(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end
