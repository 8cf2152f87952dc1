"""What is in a checkpoint directory: which files matter, what they hash to, which tensors they hold.

Nothing here imports torch unless a `pytorch_model.bin` has to be opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from pipelines.errors import CheckpointError

_TEXT_SUFFIXES = (".json", ".txt", ".model")
_INDEX = ".index.json"  # of a sharded form: it names the shards
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".cp", ".pt", f".safetensors{_INDEX}", f".bin{_INDEX}")
# Where a folder's weights are looked for, in this order.
_WEIGHTS = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin", f"pytorch_model.bin{_INDEX}")
CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_IGNORED_FOLDERS = ("onnx", "openvino", "coreml", "eval", "runs", "logs", "gguf")
_IGNORED_FILES = (
    "README.txt",
    "LICENSE.txt",
    "requirements.txt",
    "data_config.json",
    "trainer_state.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "training_args.bin",
    "optimizer.bin",
    "scheduler.bin",
    "optimizer.pt",
    "scheduler.pt",
    "flax_model.msgpack",
)
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_NAMES_LIMIT = 8_000_000  # bytes; the names of a BERT's tensors take under 1 MB, optimizer state included
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself


def refuse(what: str, directory: str, *, expected: str = "", hint: str = "") -> NoReturn:
    """Raise the CheckpointError of this directory."""
    raise CheckpointError(what, where=directory, expected=expected, hint=hint)


def relevant_names(names: list[str]) -> list[str]:
    """Return, sorted, the relative names (`/`-separated) that change a checkpoint's vectors.

    Configs, tokeniser files and the weights that are loaded stay; documentation, training logs, other runtimes' exports
    and other weights go.
    """
    kept = sorted(name for name in names if _may_matter(name))
    folders: dict[str, set[str]] = {}
    for name in kept:
        folders.setdefault(os.path.dirname(name), set()).add(os.path.basename(name))
    loaded = {(folder, file) for folder, files in folders.items() for file in _loaded_weights(files)}
    return [name for name in kept if not name.endswith(_WEIGHT_SUFFIXES) or os.path.split(name) in loaded]


def names_to_fetch(names: list[str]) -> list[str]:
    """Return which files of a listing a local copy needs: the relevant ones; of a spaCy pipeline, all."""
    if {"meta.json", "config.cfg"} <= set(names):
        return sorted(name for name in names if not any(piece.startswith(".") for piece in name.split("/")))
    return relevant_names(names)


def _first_weights(files: Collection[str]) -> str:
    """Return which of a folder's files are its weights, or name them; "" for none."""
    return next((name for name in _WEIGHTS if name in files), "")


def _loaded_weights(files: Collection[str]) -> list[str]:
    """Return those of a folder's files that are loaded as weights.

    That is the first of _WEIGHTS; with an index, every file in its format, because names alone don't tell shards.
    Without either and without modules.json, DPR's own `.cp`. Always an OpenAI CLIP's `.pt`, which a config.json names.
    """
    first, suffixes = _first_weights(files), [".pt"]
    if first.endswith(_INDEX):
        suffixes.append(os.path.splitext(first.removesuffix(_INDEX))[1])
    elif not first and "modules.json" not in files:
        suffixes.append(".cp")
    return [file for file in files if file == first or file.endswith(tuple(suffixes))]


def _may_matter(name: str) -> bool:
    *folders, file = name.split("/")
    if any(folder.startswith(".") or folder in _IGNORED_FOLDERS for folder in folders):
        return False
    if file.startswith(".") or file in _IGNORED_FILES:
        return False
    return file == CLIP_VOCABULARY or file.endswith(_TEXT_SUFFIXES + _WEIGHT_SUFFIXES)


def check_counted(folder: str, names: list[str], *, expected: str) -> None:
    """Raise CheckpointError for files of the folder that are to be loaded, but are no part of the digest."""
    counted = relevant_names([*os.listdir(folder), *names])
    if left_out := [name for name in names if name not in counted]:
        refuse(f"the checkpoint's digest leaves out {', '.join(left_out)}", folder, expected=expected, hint="rename it")


def checkpoint_digest(directory: str) -> str:
    """Return the sha256 (hex) over the relevant files' relative names and contents, wherever the directory lies.

    Raises CheckpointError when the directory is absent or holds nothing relevant.
    """
    digest = hashlib.sha256()
    for name in _checkpoint_names(directory):
        digest.update(f"{name}\0{file_sha256(Path(directory, name))}\n".encode())
    return digest.hexdigest()


def checkpoint_stamps(directory: str) -> tuple[tuple[str, int, int, int], ...]:
    """Return (name, bytes, two times in ns) of each file that the digest covers: other ones if a file was written to.

    Raises what `checkpoint_digest` raises.
    """
    found = [(name, Path(directory, name).stat()) for name in _checkpoint_names(directory)]
    # Copies may keep the time of the original's last write, which of checkpoints out of an archive is often all one.
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found)


def _checkpoint_names(directory: str) -> list[str]:
    root = Path(directory)
    if not root.is_dir():
        refuse("the checkpoint directory does not exist", directory)
    names = relevant_names([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    if not names:
        refuse("the checkpoint directory holds no model files", directory)
    return names


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(directory: str, name: str, *, required: bool = False, kind: type = dict) -> Any:
    """Return the parsed file, or an empty `kind` (dict or list) when it is absent and not `required`.

    Raises CheckpointError when it is damaged or holds another kind.
    """
    path = os.path.join(directory, name)
    try:
        with open(path, encoding="utf-8") as handle:
            content = json.load(handle)
    except FileNotFoundError:
        if required:
            refuse(f"{name} is missing", directory)
        return kind()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}", where=directory, expected="valid JSON") from error
    if not isinstance(content, kind):
        refuse(f"{name} holds a {type(content).__name__}", directory, expected=f"a JSON {kind.__name__}")
    return content


def peek_json(directory: str, name: str) -> dict[str, Any]:
    """Return the parsed file, or {} for anything else than a readable JSON object: for recognising, never for use."""
    try:
        content: dict[str, Any] = read_json(directory, name)
    except CheckpointError:
        return {}
    return content


def native_files(directory: str) -> list[str]:
    """Return the paths of DPR's own `.cp` files, or [] where there are none or others are loaded. Never raises."""
    try:
        names = relevant_names(os.listdir(directory))
    except OSError:
        return []
    return [os.path.join(directory, name) for name in names if name.endswith(".cp")]


def mentions(path: str, words: tuple[str, ...]) -> set[str]:
    """Return those of `words` that the names in a torch file contain, without unpickling anything.

    Reads the pickle record of torch's zip format, or the head of its old format, as bytes. Never raises.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                record = next((name for name in archive.namelist() if name.endswith("data.pkl")), "")
                content = archive.open(record).read(_NAMES_LIMIT)
        else:
            with open(path, "rb") as handle:
                content = handle.read(_NAMES_LIMIT)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError, EOFError, zlib.error):
        return set()
    return {word for word in words if word.encode() in content}


def weight_files(directory: str) -> list[str]:
    """Return the paths of the weight files that are loaded, or [] when there are none.

    In order of preference: model.safetensors, its sharded form, pytorch_model.bin, its sharded form. Raises
    CheckpointError for an index that names no files, or files that the digest would leave out.
    """
    first = _first_weights([name for name in _WEIGHTS if os.path.isfile(os.path.join(directory, name))])
    if not first.endswith(_INDEX):
        return [os.path.join(directory, first)] if first else []
    shards = read_json(directory, first).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        refuse(f"{first} names no weight files", directory, expected="weight_map: the file of each tensor")
    names = sorted({os.path.basename(str(shard)) for shard in shards.values()})
    check_counted(directory, names, expected=f"shards in the format of {first.removesuffix(_INDEX)}")
    return [os.path.join(directory, name) for name in names]


def require_files(directory: str) -> None:
    """Check that weights and a tokeniser are there, before anything slow. Raises CheckpointError naming the absent."""
    paths = weight_files(directory)
    if not paths:
        refuse(
            "the checkpoint has no weights",
            directory,
            expected="model.safetensors or pytorch_model.bin",
            hint="copy the whole model directory; a git clone without LFS leaves the weights out",
        )
    absent = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if absent:
        refuse(f"weight shards are missing: {', '.join(absent)}", directory)
    if not any(os.path.isfile(os.path.join(directory, name)) for name in TOKENISER_FILES):
        refuse("the checkpoint has no tokeniser", directory, expected=f"one of {', '.join(TOKENISER_FILES)}")


def tensor_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in the weights, reading headers only where the format allows it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        if path.endswith(".safetensors"):
            shapes.update(_safetensors_shapes(path))
        else:
            from pipelines.models.weights import read_torch_file

            shapes.update({name: tuple(tensor.shape) for name, tensor in read_torch_file(path).items()})
    return shapes


def _safetensors_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Read the header: its length as little-endian u64, then that many bytes of JSON."""
    expected = "a safetensors file; a git clone without LFS leaves a short text file instead"
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > _SAFETENSORS_HEADER_LIMIT:
                refuse("the weights are not a safetensors file", path, expected=expected)
            header = json.loads(handle.read(length))
            _check_size(path, header, 8 + length)
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"the weights cannot be read: {error}", where=path, expected=expected) from error


def _check_size(path: str, header: dict[str, Any], start: int) -> None:
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    declared, actual = start + max(ends, default=0), os.path.getsize(path)
    if actual < declared:
        refuse(f"the weights are cut off: {actual:,} of {declared:,} bytes", path, hint="copy or download them again")
