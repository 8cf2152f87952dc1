"""Text -> tokens -> vectors: an encoder's identity, and one side of it ready to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy.typing as npt

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models.engine import Engine, default_budget

if TYPE_CHECKING:
    from pipelines.config import EncoderConfig
    from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokeniser, Tokens, Tower
    from pipelines.models.clip import ImageTower
    from pipelines.storage import Store

Array = npt.NDArray[Any]

_BUDGET = "budget.json"
USUAL_TEXT = "a few words that take some time " * 16
"""Made up, and about as long as a passage: for trials."""
_IMAGE_BUDGET = 2048  # patches at once: pictures are decoded while a batch waits


@dataclass(frozen=True)
class EncoderSpec:
    """A resolved encoder: what it is, where its files are, and the fingerprint that its embeddings carry.

    `fingerprint` covers the passage side only (it names the embedding folder); `query_fingerprint` covers the query
    side, and both are bound into a version. `title_format` is the config's `encoder.formatting`; what it makes of a
    passage is part of `formatting`, and so of the fingerprint. `query_max_length` is None where it is `max_length`,
    `token_budget` where it is to be found by measurement.
    """

    checkpoint: str
    query_checkpoint: str
    family: str
    query_family: str
    dim: int
    similarity: str
    max_length: int
    compute: str
    storage: str
    token_budget: int | None
    formatting: str
    digest: str
    query_digest: str
    title_format: Formatting | None = None
    query_max_length: int | None = None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint("passage", self.family, self.digest)

    @property
    def query_fingerprint(self) -> str:
        return self._fingerprint("query", self.query_family, self.query_digest)

    def length(self, side: Side) -> int:
        """Return the most tokens of a text of one side."""
        return self.query_max_length or self.max_length if side == "query" else self.max_length

    def _fingerprint(self, side: Side, family: str, digest: str) -> str:
        from pipelines.manifest import fingerprint

        length = self.length(side)
        settings = [self.dim, self.similarity, length, self.compute, self.storage, self.formatting]
        return fingerprint([side, family, digest, *settings])

    def as_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {**asdict(self), "fingerprint": self.fingerprint, "query_fingerprint": self.query_fingerprint}


def resolve(config: EncoderConfig, on_gpu: bool = False) -> EncoderSpec:
    """Fetch and read the checkpoint(s) of `config` and settle every `auto`.

    Raises CheckpointError when a directory is not what it should be or the two sides differ in width or similarity,
    ConfigError for a similarity or formatting that the model does not have.
    """
    from pipelines.models import checkpoint_digest
    from pipelines.models.fetch import fetch

    query = config.query_checkpoint or config.checkpoint
    directory, query_directory = fetch(config.checkpoint), fetch(query)
    info, formatting = describe_encoder(config.checkpoint, directory, config.similarity, config.formatting)
    query_info, _ = describe_encoder(query, query_directory, config.similarity)
    _check_sides(info, query_info, directory, query_directory)
    length, query_length = (min(config.max_length or i.max_length, i.max_length) for i in (info, query_info))
    digest = checkpoint_digest(directory)
    return EncoderSpec(
        checkpoint=config.checkpoint,
        query_checkpoint=query,
        family=info.family,
        query_family=query_info.family,
        dim=info.dim,
        similarity=info.similarity,
        max_length=length,
        compute=settle_compute(config.compute, "cuda" if on_gpu else "cpu"),
        storage=config.storage,
        token_budget=config.token_budget,
        formatting=info.formatting,
        digest=digest,
        query_digest=digest if query_directory == directory else checkpoint_digest(query_directory),
        title_format=formatting,
        query_max_length=query_length if query_length != length else None,
    )


def _check_sides(passage: EncoderInfo, query: EncoderInfo, where: str, query_where: str) -> None:
    """Raise CheckpointError unless each encoder is of its side and the two sides' vectors can be compared."""
    for info, side, directory in ((passage, "passage", where), (query, "query", query_where)):
        own = info.details.get("side", "both")
        if own not in (side, "both"):
            hint = "encoder.checkpoint encodes passages, encoder.query_checkpoint queries: set both, not swapped"
            raise CheckpointError(f"this encodes the {own} side", where=directory, expected=f"one for the {side} side",
                                  hint=hint)  # fmt: skip
    what = ""
    if passage.dim != query.dim:
        what = f"the query encoder gives {query.dim} values, the passage encoder {passage.dim}"
    elif passage.similarity != query.similarity:
        what = f"the query encoder was trained for {query.similarity}, the passage encoder for {passage.similarity}"
    if what:
        hint = "check encoder.query_checkpoint and encoder.similarity"
        raise CheckpointError(what, where=query_where, expected="two encoders trained together", hint=hint)


def describe_encoder(
    checkpoint: str, directory: str, similarity: Similarity | None = None, formatting: Formatting | None = None
) -> tuple[EncoderInfo, Formatting | None]:
    """Return what the encoder at `directory` is, and its formatting, with what is known of a released `checkpoint`."""
    from pipelines.models import find_family
    from pipelines.models.released import settle

    family = find_family(directory)
    found = family.info(directory)
    similarity, formatting = settle(checkpoint, directory, found.family, similarity, formatting)
    if similarity or formatting:
        found = family.info(directory, similarity=similarity, formatting=formatting)
    return found, formatting


def settle_compute(compute: str, device: str) -> str:
    """Return the arithmetic of a model on `device`: as asked for, or for `auto` what the hardware has."""
    return default_compute(device != "cpu") if compute == "auto" else compute


def default_compute(on_gpu: bool) -> str:
    """Return "fp16" on a GPU; on a CPU "bf16" where it multiplies that natively, else "fp32".

    A GPU is as fast in both, and fp16 has three bits more: vectors differ from fp32's by 3e-6 of cosine, in bf16 by
    1e-4. What is too large for fp16 comes out as NaN or infinity, and is refused.
    """
    import torch

    if on_gpu:
        return "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def compute_here(spec: EncoderSpec, side: Side, device: str) -> str:
    """Return the arithmetic of one side on a device: the spec's, but for fp16, which is a GPU's, on a CPU.

    There passages are computed in fp32, and queries, which are to be fast, in what the CPU is best at.
    """
    if spec.compute != "fp16" or device != "cpu":
        return spec.compute
    return "fp32" if side == "passage" else default_compute(on_gpu=False)


class Encoder:
    """One side of an encoder, ready to run: a tokeniser and a tower on a device, in `compute` arithmetic."""

    def __init__(self, spec: EncoderSpec, side: Side, device: str = "cpu", num_threads: int | None = None) -> None:
        from pipelines.models import find_family

        _prepare(device, num_threads)
        self.spec, self.side, self.device = spec, side, device
        self.compute = compute_here(spec, side, device)
        directory = local_checkpoint(spec, side)
        self.tokeniser = load_tokeniser(spec, side)
        self.tower: Tower = find_family(directory).load_tower(
            directory, side, self.compute, device, similarity=_similarity(spec)
        )
        budget = spec.token_budget or default_budget(device)
        packs = getattr(self.tower, "packs", 0)
        self.engine = Engine(self.tower, self.tokeniser.pad_id, self.tower.dim, device, budget, packs)

    @property
    def computed_tokens(self) -> int:
        """Tokens of the last call, with the padding that had to be computed."""
        return self.engine.computed_tokens

    def encode_tokens(self, tokens: Tokens) -> Array:
        """Return emb_ND (N, D) float32 for N texts, in their order."""
        return self.engine.run(tokens)

    def encode_queries(self, texts: Sequence[str]) -> Array:
        """Return emb_BD (B, D) float32 for B query texts."""
        return self.encode_tokens(self.tokeniser.queries(list(texts)))

    def encode_passages(self, titles: Sequence[str], texts: Sequence[str]) -> Array:
        """Return emb_ND (N, D) float32 for N passages."""
        return self.encode_tokens(self.tokeniser.passages(list(titles), list(texts)))


def settle_budget(encoder: Encoder, notes: Store) -> None:
    """Give the encoder the token budget of the whole run, which the first worker to come here measures.

    notes: where the run's workers find what one of them measured. Kernels are picked by the size of a
    micro-batch, so workers with budgets of their own would not give the same bits (a CPU in bf16 gives them with any).
    Made-up texts are measured, not a part's own: no row of the corpus can spoil it, and it is done before work begins.
    """
    if encoder.spec.token_budget is not None:
        return
    if not notes.exists(_BUDGET):
        with suppress(Exception):  # then the device's usual budget stays
            encoder.engine.measure_budget(encoder.tokeniser.passages([""], [USUAL_TEXT]))
        notes.create(_BUDGET, json.dumps({"token_budget": encoder.engine.budget}).encode())
    encoder.engine.budget = int(json.loads(notes.read(_BUDGET))["token_budget"])


class ImageEncoder:
    """The passage side of an encoder that takes images, ready to run on a device."""

    def __init__(self, spec: EncoderSpec, device: str = "cpu", num_threads: int | None = None) -> None:
        _prepare(device, num_threads)
        self.spec, self.compute = spec, compute_here(spec, "passage", device)
        family = check_takes_images(spec)
        directory = local_checkpoint(spec, "passage")
        self.budget = spec.token_budget or _IMAGE_BUDGET
        self.tower: ImageTower = family.load_image_tower(directory, self.compute, device, similarity=_similarity(spec))

    def encode_images(self, images: Sequence[bytes]) -> Array:
        """Return emb_ND (N, D) float32 for N image files, in their order, under the token budget."""
        return self.tower.encode_images(images, max(1, self.budget // self.tower.num_tokens))

    def num_tokens(self, num_images: int) -> int:
        return num_images * self.tower.num_tokens


def check_takes_images(spec: EncoderSpec) -> Any:
    """Return the family of the passage encoder. Raises CheckpointError when it embeds no images."""
    from pipelines.models import find_family
    from pipelines.models.fetch import fetch
    from pipelines.pixels import require_pillow

    directory = fetch(spec.checkpoint)
    family: Any = find_family(directory)
    if not hasattr(family, "accepts_images") or not family.accepts_images(directory):
        raise CheckpointError(
            f"the corpus is made of images, and this encoder ({spec.family}) takes text only",
            where=directory,
            expected="an encoder with an image side: CLIP",
            hint="set encoder.checkpoint to a CLIP; a text encoder of the same space goes to encoder.query_checkpoint",
        )
    require_pillow()
    return family


def _prepare(device: str, num_threads: int | None) -> None:
    """Set torch's threads. Raises ConfigError when the device is not here."""
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is visible here", hint="set cluster.gpus_per_worker: 0 to encode on CPUs")


def _similarity(spec: EncoderSpec) -> Similarity:
    return cast("Similarity", spec.similarity)


def local_checkpoint(spec: EncoderSpec, side: Side) -> str:
    """Return the local directory of one side, refusing one whose files are no longer those of `spec`."""
    from pipelines.models import checkpoint_stamps
    from pipelines.models.fetch import fetch

    name = spec.checkpoint if side == "passage" else spec.query_checkpoint
    directory = fetch(name)
    expected = spec.digest if side == "passage" else spec.query_digest
    if (found := _cached_digest(directory, checkpoint_stamps(directory))) != expected:
        raise CheckpointError(
            f"the {side} encoder's files are not those that made these embeddings",
            where=directory,
            expected=f"digest {expected[:16]}, found {found[:16]}",
            hint="restore the checkpoint, or encode again with the new one (it gets a place of its own)",
        )
    return directory


@lru_cache(maxsize=16)
def _cached_digest(directory: str, stamps: tuple[Any, ...]) -> str:
    from pipelines.models import checkpoint_digest

    return checkpoint_digest(directory)


def load_tokeniser(spec: EncoderSpec, side: Side) -> Tokeniser:
    """Return the tokeniser of one side, without loading any weights."""
    from pipelines.models import find_family
    from pipelines.models.fetch import fetch

    directory = fetch(spec.checkpoint if side == "passage" else spec.query_checkpoint)
    title_format = spec.title_format if side == "passage" else None  # queries have no titles
    return find_family(directory).load_tokeniser(directory, spec.length(side), formatting=title_format)
