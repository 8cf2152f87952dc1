"""The files behind the sources: name their format and version, read their bytes. Local, s3:// and https://.

Every failure becomes one of two errors here: InputError for what is not there or damaged, StorageError for a store or
server that refuses.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec

from pipelines.errors import ConfigError, InputError, PinakesError, StorageError
from pipelines.pixels import EXTENSIONS
from pipelines.readers.base import FORMATS, ReadOptions, nearest

BLOCK_BYTES = 4 << 20
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_EXTENSIONS = {
    ".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".pq": "parquet", **dict.fromkeys(EXTENSIONS, "images"),
}  # fmt: skip
_MISSING_STATUS = (404, 410)


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def is_local(url: str) -> bool:
    return bool(fsspec.utils.get_protocol(url) in ("file", "local"))


def locate(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path there. Raises InputError for a scheme that is not known."""
    try:
        # Listings must be fresh: the sources may have been written a moment ago.
        options = {} if is_local(url) else {"use_listings_cache": False}
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        hint = "use a local path, s3://bucket/key or https://..., or install the fsspec backend of that scheme"
        raise InputError(f"cannot open the source: {error}", where=url, hint=hint) from error
    return fs, os.path.abspath(path) if is_local(url) else path


def compression_of(url: str) -> str:
    """Return the file's compression suffix (.gz, .bz2, .xz, .zst), or an empty string."""
    suffix = os.path.splitext(_file_name(url))[1].lower()
    return suffix if suffix in _COMPRESSIONS else ""


def stem_of(url: str) -> str:
    """Return the file's name without folder, compression suffix and extension."""
    name = _file_name(url)
    return os.path.splitext(name[: len(name) - len(compression_of(url))])[0]


def format_of(url: str, options: ReadOptions) -> str:
    """Return the file's format, one of FORMATS. Raises InputError when its name does not tell."""
    if options.format not in ("auto", *FORMATS):
        raise ConfigError(f"unknown corpus format {options.format!r}", expected=", ".join(("auto", *FORMATS)))
    name = _file_name(url).lower()
    extension = os.path.splitext(name[: len(name) - len(compression_of(url))])[1]
    found = options.format if options.format != "auto" else _EXTENSIONS.get(extension)
    if found is None:
        guess = nearest(extension, _EXTENSIONS) if extension else None
        hint = (f"did you mean {guess}? " if guess else "") + f"or set `format:` to {', '.join(FORMATS)}; "
        raise InputError("the file's name does not tell its format", where=url,
                         expected=f"one of {', '.join(_EXTENSIONS)}",
                         hint=hint + "give a glob when a folder holds other files too")  # fmt: skip
    if found in ("parquet", "images") and compression_of(url):
        raise InputError(f"{found.capitalize()} cannot be read through an outer compression", where=url,
                         hint="decompress the file first")  # fmt: skip
    return found


def _file_name(url: str) -> str:
    path = urlsplit(url).path if is_http(url) else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def size_of(url: str) -> int:
    """Return the file's size in bytes. Raises InputError when it is absent, StorageError when the size can't be had."""
    size = _info(url).get("size")
    if size is None:
        raise StorageError("the server does not tell the file's size", where=url, expected="a Content-Length header",
                           hint="download the file and read it from disk or from s3")  # fmt: skip
    return int(size)


def file_version(url: str) -> str:
    """Return a text that changes when the file does: its size with its ETag, or the time it was last written."""
    return version_of(_info(url))


def version_of(info: dict[str, Any]) -> str:
    """Return what a listing says of a file that changes when the file does."""
    keys = ("size", "ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated")
    return " ".join(f"{key}={info[key]}" for key in keys if info.get(key) is not None)


def _info(url: str) -> dict[str, Any]:
    fs, path = locate(url)
    with storage_errors(url):
        info: dict[str, Any] = fs.info(path)
    return info


def open_file(url: str) -> Any:
    """Open a seekable binary file. Over the network every `read` is one request for exactly those bytes."""
    fs, path = locate(url)
    with storage_errors(url):
        return fs.open(path, "rb") if is_local(url) else fs.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")


def check_ranges(url: str) -> None:
    """Raise StorageError when an HTTP server cannot send a byte range. Reads one byte."""
    size = size_of(url) if is_http(url) else 0
    if size > 1:
        with open_text(url, compressed=False) as stream:
            stream.seek(size - 1)
            stream.read(1)


@contextlib.contextmanager
def open_text(url: str, compressed: bool = True) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed as its name says; seekable unless compressed.

    A damaged compressed file raises InputError from the stream's `read`.
    """
    raw = _RawFile(open_file(url), url)
    suffix = compression_of(url) if compressed else ""
    with contextlib.closing(raw):
        if not suffix:
            yield raw  # type: ignore[misc]
            return
        with contextlib.closing(_Decompressed(raw, suffix, url)) as stream:
            yield stream  # type: ignore[misc]


class _RawFile(io.RawIOBase):
    """A file's bytes with our errors. Not closed by what reads from it, only by `open_text`."""

    def __init__(self, file: Any, url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        with storage_errors(self._url):
            return bytes(self._file.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        with storage_errors(self._url):
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Decompressed:
    """The decompressed bytes of a stream."""

    def __init__(self, raw: _RawFile, suffix: str, url: str) -> None:
        self._url = url
        # The decompressors ask for a few kilobytes at a time, too little for one network request.
        buffered = io.BufferedReader(raw, BLOCK_BYTES)
        self._stream = self._translated(lambda: _decompressor(buffered, suffix))

    def read(self, size: int) -> bytes:
        data: bytes = self._translated(lambda: self._stream.read(size))
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.close()

    def _translated(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except PinakesError:
            raise
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise InputError(f"the compressed file is damaged or cut short: {error}", where=self._url,
                             hint="copy or download the file again") from error  # fmt: skip


def _decompressor(stream: Any, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stream)
    if suffix == ".bz2":
        return bz2.BZ2File(stream)
    if suffix == ".xz":
        return lzma.LZMAFile(stream)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


@contextlib.contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn whatever a file system raises into InputError (nothing there) or StorageError (it refused)."""
    try:
        yield
    except PinakesError:
        raise
    except FileNotFoundError as error:
        # fsspec reports every failed HTTP request as a missing file; the cause tells what it really was.
        cause = error.__cause__
        if is_http(url) and cause is not None and getattr(cause, "status", None) not in _MISSING_STATUS:
            raise _refused(url, cause) from error
        raise InputError(f"there is no such file: {url}", where=url, hint="check the path") from error
    except Exception as error:  # the libraries below fsspec (botocore, aiohttp) each have their own tree
        raise _refused(url, error) from error


def _refused(url: str, error: BaseException) -> StorageError:
    told = str(error) or type(error).__name__
    if is_http(url) and ("range requests" in told or "Cannot seek" in told):
        return StorageError("the server cannot send byte ranges", where=url, expected="support for the Range header",
                            hint="download the file and read it from disk or from s3")  # fmt: skip
    return StorageError(
        f"cannot read the source: {told}", where=url, hint="check permissions, credentials and the network"
    )
