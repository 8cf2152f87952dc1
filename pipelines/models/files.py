"""What is in a checkpoint directory: which files matter, what they hash to, which tensors they hold.

Nothing here imports torch unless a `pytorch_model.bin` has to be opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

from pipelines.errors import CheckpointError

_TEXT_SUFFIXES = (".json", ".txt", ".model")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".cp", ".pt")
_SHADOWED_SUFFIXES = (".bin", ".bin.index.json", ".cp", ".pt")
_CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
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
TOKENISER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model")
_NAMES_LIMIT = 8_000_000  # bytes; the names of a BERT's tensors take under 1 MB, optimizer state included
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself


def refuse(what: str, directory: str, *, expected: str = "", hint: str = "") -> NoReturn:
    """Raise the CheckpointError of this directory."""
    raise CheckpointError(what, where=directory, expected=expected, hint=hint)


def relevant_names(names: list[str]) -> list[str]:
    """Return, sorted, the relative names (`/`-separated) that change a checkpoint's vectors.

    Configs, tokeniser files and weights stay; documentation, training logs and other runtimes' exports go. Where a
    folder has safetensors, weights in older formats do not count, because they are not loaded.
    """
    kept = [name for name in names if _may_matter(name)]
    with_safetensors = {os.path.dirname(name) for name in kept if name.endswith(".safetensors")}

    def is_shadowed(name: str) -> bool:
        return name.endswith(_SHADOWED_SUFFIXES) and os.path.dirname(name) in with_safetensors

    return sorted(name for name in kept if not is_shadowed(name))


def _may_matter(name: str) -> bool:
    *folders, file = name.split("/")
    if any(folder.startswith(".") or folder in _IGNORED_FOLDERS for folder in folders):
        return False
    if file.startswith(".") or file in _IGNORED_FILES:
        return False
    return file == _CLIP_VOCABULARY or file.endswith(_TEXT_SUFFIXES + _WEIGHT_SUFFIXES)


def checkpoint_digest(directory: str) -> str:
    """Return the sha256 (hex) over the relevant files' relative names and contents, wherever the directory lies.

    Raises CheckpointError when the directory is absent or holds nothing relevant.
    """
    root = Path(directory)
    if not root.is_dir():
        refuse("the checkpoint directory does not exist", directory)
    names = relevant_names([path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()])
    if not names:
        refuse("the checkpoint directory holds no model files", directory)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{file_sha256(root / name)}\n".encode())
    return digest.hexdigest()


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
    """Return the paths of DPR's own `.cp` files, or [] where there are none or weights in a newer format beside them.

    Newer formats come first, as in weight_files. Never raises.
    """
    try:
        names = sorted(os.listdir(directory))
        if "modules.json" in names or weight_files(directory):
            return []
    except (OSError, CheckpointError):
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

    In order of preference: model.safetensors, its sharded form, pytorch_model.bin, its sharded form.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(directory, whole)
        if os.path.isfile(path):
            return [path]
        index = read_json(directory, f"{whole}.index.json")
        if index:
            shards = sorted(set(index.get("weight_map", {}).values()))
            return [os.path.join(directory, os.path.basename(shard)) for shard in shards]
    return []


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
