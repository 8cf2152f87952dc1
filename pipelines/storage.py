"""A Store: one folder, local or on an object store, with the few operations the pipeline needs.

Everything that lands in a store lands whole: local files through a temporary name and a rename, objects through a
single PUT. `create` and `swap` are the two conditional writes (create-if-absent, replace-if-unchanged) that manifests
and aliases rest on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from pipelines.errors import ArtifactError, ConfigError, StorageError

_T = TypeVar("_T")
_STALE_TEMP_SECONDS = 3600.0
_REMOTE_ATTEMPTS = 5
_REMOVE_ATTEMPTS = 5
_TRANSIENT = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, None}


class Store:
    """A folder at `url` (a local path, s3://bucket/prefix, or any fsspec URL). Cheap to build and to pickle."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = str(url).rstrip("/")
        try:
            self.is_local = fsspec.utils.get_protocol(self.url) in ("file", "local")
            # Listings must be fresh: another process, or another driver, writes here too.
            options = {} if self.is_local else {"use_listings_cache": False}
            self.fs, root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            hint = "use a local path, s3://bucket/prefix, or install the fsspec backend of that scheme"
            raise ConfigError(f"cannot open the store: {error}", where=self.url, hint=hint) from error
        self.root = root.rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def child(self, *names: str) -> Store:
        return Store("/".join([self.url, *names]))

    def path(self, name: str = "") -> str:
        """Return the full path of `name` for the underlying file system (and for messages)."""
        return f"{self.root}/{name}" if name else self.root

    # Reading

    def exists(self, name: str) -> bool:
        return bool(self._try("look for", name, lambda: self.fs.exists(self.path(name))))

    def size(self, name: str) -> int:
        return int(self._try("measure", name, lambda: self.fs.size(self.path(name))))

    def read(self, name: str) -> bytes:
        """Return the whole of `name`. Raises ArtifactError when it is absent, StorageError when it can't be read."""
        data: bytes = self._try("read", name, lambda: self.fs.cat_file(self.path(name)))
        return data

    def open(self, name: str) -> IO[bytes]:
        handle: IO[bytes] = self._try("open", name, lambda: self.fs.open(self.path(name), "rb"))
        return handle

    def files(self, prefix: str = "") -> list[str]:
        """Return the sorted names of the files directly in the store whose name starts with `prefix`."""

        def names() -> list[str]:
            try:
                entries = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            found = (e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "file")
            return sorted(n for n in found if n.startswith(prefix))

        result: list[str] = self._try("list", "", names)
        return result

    def folders(self) -> list[str]:
        """Return the sorted names of the folders directly in the store."""

        def names() -> list[str]:
            try:
                entries = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
            return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

        result: list[str] = self._try("list", "", names)
        return result

    def sha256(self, name: str) -> str:
        """Return the hex sha256 of `name`, streamed."""
        handle: Any
        with self.open(name) as handle:
            return str(self._try("read", name, lambda: hashlib.file_digest(handle, "sha256").hexdigest()))

    def local(self, name: str, sha256: str) -> str:
        """Return a local path that holds `name`: itself, or a copy downloaded once into the cache.

        Raises ArtifactError when the bytes are not those of `sha256`.
        """
        if self.is_local:
            if (found := self.sha256(name)) != sha256:
                raise damaged(self.path(name), found, sha256)
            return self.path(name)
        cached = os.path.join(cache_dir("files"), f"{sha256[:32]}-{name.rsplit('/', 1)[-1]}")
        if not os.path.exists(cached) or Store(os.path.dirname(cached)).sha256(os.path.basename(cached)) != sha256:
            with temporary_file(cache_dir("files")) as temp:
                self._try("download", name, lambda: self.fs.get_file(self.path(name), temp))
                if (found := Store(os.path.dirname(temp)).sha256(os.path.basename(temp))) != sha256:
                    raise damaged(self.path(name), found, sha256)
                os.replace(temp, cached)
        return cached

    # Writing

    def put(self, name: str, data: bytes) -> None:
        """Put `data` in place under `name`, whole or not at all."""
        if self.is_local:
            self._try("write", name, lambda: self._rename_in(name, lambda temp: _write_bytes(temp, data)))
        else:
            self._try("write", name, lambda: self.fs.pipe_file(self.path(name), data))

    def put_file(self, name: str, local_path: str) -> None:
        """Put the local file in place under `name`, whole or not at all; the local file may be moved away."""
        if self.is_local:
            self._try("write", name, lambda: self._move_in(name, local_path))
        else:
            self._try("write", name, lambda: self.fs.put_file(local_path, self.path(name)))

    def take(self, name: str, other: Store) -> None:
        """Put a file of `other`, under the same root, in place under its own name: linked where that can be.

        Both then are one file on the disk, which is safe because files in place are replaced, never written to.
        """
        source, target = other.path(name), self.path(name)

        def link(temp: str) -> None:
            try:
                os.link(source, temp)
            except OSError:
                shutil.copyfile(source, temp)

        if self.is_local:
            self._try("write", name, lambda: self._rename_in(name, link))
        else:
            self._try("write", name, lambda: self.fs.cp_file(source, target))

    @contextlib.contextmanager
    def temporary(self) -> Iterator[str]:
        """Give a local path for a file that `put_file` then moves in place: in a local store's own folder.

        Elsewhere the move would be a copy, and the folder for temporary files may be too small, or memory.
        """
        folder = self.path() if self.is_local else None
        if folder:
            os.makedirs(folder, exist_ok=True)
        with temporary_file(folder) as path:
            yield path

    def create(self, name: str, data: bytes) -> bool:
        """Put `data` under `name` unless something is there; return whether it was put."""

        def link(temp: str) -> None:
            _write_bytes(temp, data)
            os.link(temp, self.path(name))

        try:
            if self.is_local:
                self._try("create", name, lambda: self._with_temp(name, link))
            else:
                self._try("create", name, lambda: self.fs.pipe_file(self.path(name), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def swap(self, name: str, data: bytes, expected: bytes | None) -> None:
        """Replace `name` by `data` if it still holds `expected` (None: if it is absent).

        Raises StorageError when somebody else changed it in between.
        """
        lost = StorageError(
            f"{name} was changed by somebody else at the same moment",
            where=self.path(name),
            hint="look at it again (`pinakes status`) and repeat the command",
        )
        if expected is None:
            if not self.create(name, data):
                raise lost
        elif self.is_local:
            with locked(self.path(name) + ".lock"):
                if self.read(name) != expected:
                    raise lost
                self.put(name, data)
        else:
            self._swap_object(name, data, expected, lost)

    def _swap_object(self, name: str, data: bytes, expected: bytes, lost: StorageError) -> None:
        etag = self._try("look at", name, lambda: self.fs.info(self.path(name))).get("ETag")
        if self.read(name) != expected:
            raise lost
        if etag is None or not hasattr(self.fs, "call_s3"):
            self.put(name, data)  # a store without conditional replace: the check above is the best there is
            return
        bucket, key = self.path(name).split("/", 1)
        try:
            self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=etag)
        except Exception as error:
            # s3fs translates 412 to FileExistsError or to a plain OSError, depending on the server's error code.
            if isinstance(error, FileExistsError) or "Precondition" in str(error) or "412" in str(error):
                raise lost from error
            raise self._explain("replace", name, error) from error

    def remove(self, name: str) -> None:
        """Remove `name`; being absent already is fine."""
        with contextlib.suppress(FileNotFoundError):
            self._try("remove", name, lambda: self.fs.rm_file(self.path(name)), missing=FileNotFoundError)

    def remove_all(self) -> None:
        """Remove the store's folder and everything in it; being absent already is fine.

        Somebody else may remove it, or write into it, at the same moment: then look again a few times.
        """
        for attempt in range(_REMOVE_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                try:
                    self._try("remove", "", lambda: self.fs.rm(self.root, recursive=True), missing=FileNotFoundError)
                except StorageError as error:
                    busy = getattr(error.__cause__, "errno", None) == errno.ENOTEMPTY
                    if not busy or attempt == _REMOVE_ATTEMPTS - 1:
                        raise
            if not self.is_local or not os.path.exists(self.root):
                return

    def sweep_temporaries(self, age_seconds: float = _STALE_TEMP_SECONDS) -> None:
        """Remove the temporary files that killed writers left behind: older than anybody could still be writing."""
        if self.is_local:
            for name in self.files(".tmp-"):
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(self.path(name)).st_mtime > age_seconds:
                        os.unlink(self.path(name))

    # Inside

    def _rename_in(self, name: str, fill: Callable[[str], None]) -> None:
        def into_place(temp: str) -> None:
            fill(temp)
            os.replace(temp, self.path(name))
            _sync_folder(os.path.dirname(self.path(name)))

        self._with_temp(name, into_place)

    def _move_in(self, name: str, local_path: str) -> None:
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        _sync_file(local_path)
        try:
            os.replace(local_path, self.path(name))
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            self._rename_in(name, lambda temp: _copy(local_path, temp))
        _sync_folder(os.path.dirname(self.path(name)))

    def _with_temp(self, name: str, use: Callable[[str], None]) -> None:
        folder = os.path.dirname(self.path(name))
        os.makedirs(folder, exist_ok=True)
        with temporary_file(folder) as temp:
            use(temp)

    def _try(self, doing: str, name: str, action: Callable[[], _T], missing: type[Exception] | None = None) -> _T:
        """Run `action`, retrying what is worth retrying on a remote store, and explain what remains."""
        for attempt in range(1, _REMOTE_ATTEMPTS + 1):
            try:
                return action()
            except FileExistsError:
                raise
            except FileNotFoundError as error:
                if missing:
                    raise
                expected = "a file that an earlier step writes"
                hint = "run that step again, or check the root and the name"
                raise ArtifactError(
                    f"cannot {doing} {name or 'the folder'}: it is not there",
                    where=self.path(name),
                    expected=expected,
                    hint=hint,
                ) from error
            except Exception as error:
                transient = not self.is_local and isinstance(error, OSError) and error.errno in _TRANSIENT
                if not transient or attempt == _REMOTE_ATTEMPTS:
                    raise self._explain(doing, name, error) from error
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _explain(self, doing: str, name: str, error: Exception) -> StorageError:
        number = getattr(error, "errno", None)
        hints = {
            errno.ENOSPC: "the disk is full: free some space or choose another root, then run again",
            errno.EDQUOT: "the disk quota is used up: free some space or choose another root, then run again",
            errno.EACCES: "permission is denied: check the owner of the folder, or the credentials and bucket policy",
            errno.EPERM: "permission is denied: check the owner of the folder, or the credentials and bucket policy",
            errno.EROFS: "the file system is read-only: choose another root",
        }
        hint = hints.get(number or 0, "check that the store is reachable and its credentials, then run again")
        return StorageError(
            f"cannot {doing} {name or 'the folder'}: {error or type(error).__name__}", where=self.path(name), hint=hint
        )


def cache_dir(kind: str) -> str:
    """Return (and make) our cache folder for `kind`, under $PINAKES_CACHE or ~/.cache/pinakes."""
    base = os.environ.get("PINAKES_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "pinakes")
    folder = os.path.join(base, kind)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        hint = "set PINAKES_CACHE to a folder that can be written"
        raise StorageError(f"cannot make the cache folder: {error}", where=folder, hint=hint) from error
    return folder


@contextlib.contextmanager
def temporary_file(folder: str | None = None) -> Iterator[str]:
    """Give the path of a file that does not exist yet and is removed afterwards if it does."""
    path = os.path.join(folder or tempfile.gettempdir(), f".tmp-{uuid.uuid4().hex}")
    try:
        yield path
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def damaged(where: str, found: str, expected: str) -> ArtifactError:
    """Return the error for a file whose checksum is not the recorded one."""
    return ArtifactError(
        "the file is damaged: its checksum is not the recorded one",
        where=where,
        expected=f"sha256 {expected[:16]}…, found {found[:16]}…",
        hint="restore it from a copy, or delete it and run the step that makes it again",
    )


def _write_bytes(path: str, data: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _copy(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    _sync_file(target)


def _sync_file(path: str) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock file at `path`, which one thread of one process of this machine does at a time; wait for it."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
