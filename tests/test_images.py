"""Folders of image files become snapshots, vectors and an index that texts find them in; bad files are counted."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.encode_workers import ImageEncoderActor, ImageReader
from pipelines import corpus, embeddings, staging
from pipelines.config import CorpusConfig, EncoderConfig, IndexConfig
from pipelines.encode import Encoder, EncoderSpec, ImageEncoder, check_takes_images, resolve
from pipelines.errors import CheckpointError, ConfigError, InputError
from pipelines.readers import ReadOptions, Reject, Row, plan_splits, read_all
from pipelines.schema import IMAGE_PASSAGE, PASSAGE, REASONS
from tests.checkpoints import write_sentence_transformer
from tests.checkpoints.clip import DIM, preprocessor, write_hub_clip, write_openai_clip
from tests.test_corpus import ingest, rows_of, write_tsv


def picture(seed: int, kind: str = "PNG", size: tuple[int, int] = (40, 33), mode: str = "RGB") -> bytes:
    """Return an image file: coarse random blocks, so that pictures differ also when they are small."""
    from PIL import Image

    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(blocks).resize(size).convert(mode).save(sink, kind)
    return sink.getvalue()


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes whose header promises more pixels than fit in memory."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


GOOD = {
    "a/one.png": picture(1),
    "a/two.jpg": picture(2, "JPEG"),
    "b/one.png": picture(3, mode="RGBA"),
    "b/cmyk.JPEG": picture(4, "JPEG", mode="CMYK"),
    "b/palette.gif": picture(5, "GIF", mode="P"),
    "grey.tif": picture(6, "TIFF", mode="L"),
    "ünï.webp": picture(7, "WEBP"),
    "same-as-one.png": picture(1),
}
BAD = {
    "bad/empty.png": (b"", "bad_image", "empty"),
    "bad/text.jpg": (b"not a picture", "bad_image", "not an image"),
    "bad/cut.jpg": (picture(8, "JPEG", (200, 200))[:900], "bad_image", "damaged or cut short"),
    "bad/cut.png": (picture(8, "PNG", (200, 200))[:400], "bad_image", "damaged or cut short"),
    "bad/bomb.png": (bomb(60_000, 60_000), "bad_image", "too large to decode safely"),
    "bad/bomb-small.png": (bomb(10_000, 9_000), "bad_image", "too large to decode safely: 10000 x 9000"),
    "bad/line.png": (picture(9, size=(3000, 2)), "bad_image", "3000 x 2 pixels"),
    "bad/script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bad_image", "not an image"),
    "bad/large.bmp": (picture(10, "BMP", (300, 300)), "oversized_row", "set corpus.max_row_bytes"),
}


def write_folder(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("pictures"), GOOD)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_hub_clip(str(tmp_path_factory.mktemp("clip")), weights="safetensors")


@pytest.fixture(scope="module")
def spec(model: str) -> EncoderSpec:
    return resolve(EncoderConfig(checkpoint=model, compute="fp32", storage="fp32"))


def read(sources: Any, **options: Any) -> list[Row | Reject]:
    settings = ReadOptions(**options)
    return list(read_all(plan_splits(sources, settings), settings))


def test_each_file_is_a_row_named_within_its_source(folder: str) -> None:
    found = [row for row in read(folder, format="images") if isinstance(row, Row)]
    assert {row.id: row.image for row in found} == GOOD
    assert [row.id for row in found] == sorted(GOOD)
    assert {(row.title, row.text == row.id, row.answers) for row in found} == {("", True, None)}
    assert read(folder) == found  # the suffixes tell
    for split_bytes in (1, 500, 10_000):
        assert read(folder + "/", split_bytes=split_bytes) == found
    inside = read(f"{folder}/b/*")
    assert [row.id for row in inside if isinstance(row, Row)] == ["cmyk.JPEG", "one.png", "palette.gif"]
    wide = read(f"{folder}/*/*.png")
    assert [row.id for row in wide if isinstance(row, Row)] == ["a/one.png", "b/one.png"]
    (alone,) = read(f"{folder}/a/two.jpg")
    assert isinstance(alone, Row)
    assert (alone.id, alone.image) == ("two.jpg", GOOD["a/two.jpg"])


def test_files_are_grouped_into_splits_by_size_and_folder(folder: str) -> None:
    one = plan_splits(folder, ReadOptions())
    assert [(len(s.files), s.start, s.stop) for s in one] == [(len(GOOD), 0, len(GOOD))]
    each = plan_splits(folder, ReadOptions(split_bytes=1))
    assert [s.files[0][0] for s in each] == sorted(GOOD)
    assert [s.index for s in each] == list(range(len(GOOD)))
    two = plan_splits([f"{folder}/a", f"{folder}/b/c*"], ReadOptions())
    assert [[name for name, _ in s.files] for s in two] == [["one.png", "two.jpg"], ["cmyk.JPEG"]]
    assert all(version.startswith("size=") for s in each for _, version in s.files)


def test_ambiguous_sources_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"two images would have the id 'one\.png'"):
        plan_splits([f"{folder}/a", f"{folder}/b"], ReadOptions())
    table = write_tsv(tmp_path / "rows.tsv", [("1", "text", "title")])
    with pytest.raises(InputError, match="images and tsv among the sources"):
        plan_splits([folder, table], ReadOptions())
    write_folder(tmp_path, {"x.png.gz": b"x"})
    with pytest.raises(InputError, match="Images cannot be read through an outer compression"):
        plan_splits(str(tmp_path / "x.png.gz"), ReadOptions())
    with pytest.raises(ConfigError, match="image files have no columns"):
        plan_splits(folder, ReadOptions(columns={"text": "caption"}))
    odd = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(odd)).write_bytes(GOOD["a/one.png"])
    with pytest.raises(InputError, match="not UTF-8"):
        plan_splits(str(tmp_path / "*.png"), ReadOptions())


def test_reading_from_an_object_store_gives_the_same_rows(folder: str) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in GOOD.items():
        memory.pipe(f"/pictures-test/{name}", data)
    try:
        assert read("memory://pictures-test") == read(folder)
        assert [r.id for r in read("memory://pictures-test/a/*.png") if isinstance(r, Row)] == ["one.png"]
    finally:
        memory.rm("/pictures-test", recursive=True)


def test_a_snapshot_of_images_carries_their_bytes(folder: str, tmp_path: Path) -> None:
    manifest, store = ingest(tmp_path, sources=[folder], part_size=3)
    assert manifest["images"] is True
    assert [p["num_rows"] for p in manifest["parts"]] == [3, 3, 2]
    assert pq.read_schema(store.path("part-00000.parquet")).equals(IMAGE_PASSAGE)
    tables = [corpus.read_part(store, entry, images=True) for entry in manifest["parts"]]
    assert {r["id"]: r["image"] for table in tables for r in table.to_pylist()} == GOOD
    assert corpus.read_part(store, manifest["parts"][0]).schema.equals(PASSAGE)  # what indexes and serving read
    assert all("image" not in row for row in rows_of(manifest, store))


def test_bytes_are_part_of_the_snapshots_name_but_the_place_is_not(folder: str, tmp_path: Path) -> None:
    first, _ = ingest(tmp_path / "r1", sources=[folder])
    moved, _ = ingest(tmp_path / "r2", sources=[write_folder(tmp_path / "copy", GOOD)], split_bytes=1)
    assert moved["snapshot"] == first["snapshot"]
    write_folder(tmp_path / "copy", {"grey.tif": GOOD["a/one.png"]})
    changed, _ = ingest(tmp_path / "r3", sources=[str(tmp_path / "copy")])
    assert changed["snapshot"] != first["snapshot"]
    plan = corpus.plan_ingest(CorpusConfig(sources=[str(tmp_path / "copy")]))
    os.utime(tmp_path / "copy/grey.tif", (1, 1))
    assert corpus.plan_ingest(CorpusConfig(sources=[str(tmp_path / "copy")])).inputs != plan.inputs


def test_snapshots_of_text_keep_their_names_and_schema(tmp_path: Path) -> None:
    """The very name that this snapshot had before there were images."""
    rows = [(str(i), f"text {i}", f"title {i}") for i in range(10)]
    manifest, store = ingest(tmp_path, sources=[write_tsv(tmp_path / "a.tsv", rows)], part_size=4)
    assert manifest["snapshot"] == "136bc2cead497bee"
    assert "images" not in manifest
    assert pq.read_schema(store.path("part-00000.parquet")).equals(PASSAGE)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_files_go_to_quarantine_with_the_reason(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", GOOD | {name: data for name, (data, _, _) in BAD.items()})
    options: dict[str, Any] = {"sources": [source], "format": "images", "max_row_bytes": 100_000}
    manifest, store = ingest(tmp_path / "root", max_quarantined_share=0.6, **options)
    refused = {r["source"]: r for r in pq.read_table(store.path("quarantine.parquet")).to_pylist()}
    assert set(refused) == {f"{source}/{name}" for name in BAD}
    for name, (_, reason, detail) in BAD.items():
        entry = refused[f"{source}/{name}"]
        assert (entry["reason"], entry["snippet"]) == (reason, name)
        assert detail in entry["detail"]
        assert reason in REASONS
    assert sorted(row["id"] for row in rows_of(manifest, store)) == sorted(GOOD)
    with pytest.raises(InputError, match="9 of 17 rows were refused: 8 bad_image, 1 oversized_row"):
        ingest(tmp_path / "strict", **options)


def test_chunks_and_parts_stay_small(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(staging, "_IMAGES_IN_PART", 5)
    plan = corpus.plan_ingest(CorpusConfig(sources=[folder]))
    staged = [corpus.stage_split(corpus.staging_store(str(tmp_path), plan), plan, split) for split in plan.splits]
    assert [rows for s in staged for _, rows in s.chunks] == [1] * len(GOOD)
    manifest, _ = ingest(tmp_path, sources=[folder])
    assert [p["num_rows"] for p in manifest["parts"]] == [5, 3]
    assert manifest["part_size"] == 5


def test_images_without_pillow_are_refused_before_anything_is_read(
    folder: str, spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for refuse in (lambda: plan_splits(folder, ReadOptions()), lambda: check_takes_images(spec)):
        with pytest.raises(ConfigError, match=r"pip install 'pinakes\[images\]'"):
            refuse()


# Encode and search


def oracle(model: str, texts: list[str]) -> tuple[Any, Any]:
    """Return the unit vectors (texts, good images in order of name) of transformers' CLIPModel."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = f"{model}/0_CLIPModel"
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    images = [Image.open(io.BytesIO(GOOD[name])) for name in sorted(GOOD)]
    pixels = CLIPImageProcessorPil(**preprocessor())(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        both = clip.get_text_features(**tokens).pooler_output, clip.get_image_features(pixels).pooler_output
    unit = [torch.nn.functional.normalize(emb, dim=1).numpy() for emb in both]
    return unit[0], unit[1]


def test_images_are_encoded_as_they_come_and_found_by_text(
    folder: str, model: str, spec: EncoderSpec, tmp_path: Path
) -> None:
    """ingest -> encode -> index -> search in a plain loop, through the very stages that a cluster runs."""
    import pyarrow as pa

    from pipelines import build
    from pipelines.index.build import read as read_index
    from pipelines.index.search import search
    from pipelines.manifest import put_done, write_manifest
    from pipelines.storage import Store
    from pipelines.train import train_quantizer

    manifest, store = ingest(tmp_path, sources=[folder], part_size=3)
    reader, actor = ImageReader(store), ImageEncoderActor(spec, "cpu", 1, Store(str(tmp_path / "notes")), 0)
    vectors = Store(str(tmp_path)).child("embeddings", manifest["snapshot"], spec.fingerprint)
    entries = []
    for number, part in enumerate(manifest["parts"]):
        row = actor(reader(pa.table({"part": [json.dumps(part)]}))).to_pylist()[0]
        assert (row["part"], row["num_rows"], row["num_tokens"]) == (number, part["num_rows"], 17 * part["num_rows"])
        receipt = put_done(vectors, embeddings.part_name(number), row["data"], "", {"num_rows": row["num_rows"]})
        entries.append({**receipt.as_entry(), "first_row": part["first_row"]})
    texts = ["a red scroll", "the great library", "war", "who wrote the book?"]
    text_QD, image_ND = oracle(model, texts)
    ours = np.concatenate([embeddings.read_vectors(vectors, entry, DIM) for entry in entries])
    np.testing.assert_allclose(ours, image_ND, atol=1e-5)
    content = {"snapshot": manifest["snapshot"], "corpus": "corpus", "encoder": spec.as_dict(), "dim": DIM}
    embedded = write_manifest(vectors, "embeddings", {**content, "num_rows": len(GOOD), "parts": entries})
    plan = build.plan_build(str(tmp_path), IndexConfig(), manifest, embedded, 1)
    (shard,) = plan.shards
    trained = train_quantizer(plan)
    index = read_index(plan.store.path(build.add_group(plan, trained, shard, 0).name))
    passages = build.write_passages(plan, shard)
    table = pa.ipc.open_file(plan.store.path(passages[0].name)).read_all()
    assert table.schema.equals(PASSAGE)
    assert table["id"].to_pylist() == sorted(GOOD)
    assert Path(plan.store.path(passages[0].name)).stat().st_size < 10_000  # no image in it
    score_QN, row_QN = search(index, Encoder(spec, "query").encode_queries(texts), len(GOOD))
    np.testing.assert_allclose(score_QN, -np.sort(-text_QD @ image_ND.T, axis=1), atol=1e-5)
    for found, expected in zip(row_QN, text_QD @ image_ND.T, strict=True):
        np.testing.assert_allclose(expected[found], -np.sort(-expected), atol=1e-5)
    assert len({tuple(found) for found in row_QN.tolist()}) > 1  # other texts find other images first


def test_both_layouts_and_batches_give_the_same_images(spec: EncoderSpec, tmp_path: Path) -> None:
    from dataclasses import replace

    files = list(GOOD.values())
    whole = ImageEncoder(spec).encode_images(files)
    np.testing.assert_allclose(ImageEncoder(replace(spec, token_budget=1)).encode_images(files), whole, atol=1e-5)
    openai = resolve(EncoderConfig(checkpoint=write_openai_clip(str(tmp_path), dtype="float32"), compute="fp32"))
    np.testing.assert_allclose(ImageEncoder(openai).encode_images(files), whole, atol=1e-5)
    np.testing.assert_allclose(whole[-1], whole[0], atol=1e-6)  # the duplicate
    assert np.abs(whole[1:-1] - whole[0]).max(axis=1).min() > 1e-3


def test_texts_go_to_a_text_encoder_of_the_same_space(model: str, tmp_path: Path) -> None:
    dense = {"out_features": DIM, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    other = write_sentence_transformer(str(tmp_path), extras=("Dense",), dense=dense, cased=True)
    spec = resolve(EncoderConfig(checkpoint=model, query_checkpoint=other, compute="fp32"))
    assert (spec.family, spec.query_family, spec.dim) == ("clip", "sentence_transformers", DIM)
    assert (spec.length("passage"), spec.length("query")) == (77, 128)
    long = Encoder(spec, "query").tokeniser.queries(["war " * 300])
    assert long.lengths.tolist() == [128]
    assert Encoder(spec, "query").encode_queries(["Who?"]).shape == (1, DIM)
    assert check_takes_images(spec).accepts_images(model)


def test_an_encoder_of_text_is_refused_for_images(tmp_path: Path, folder: str) -> None:
    from cluster.encode import encode
    from cluster.progress import Progress
    from pipelines.config import ClusterConfig

    spec = resolve(EncoderConfig(checkpoint=write_sentence_transformer(str(tmp_path / "st")), compute="fp32"))
    manifest, _ = ingest(tmp_path, sources=[folder])
    with pytest.raises(CheckpointError, match=r"(?s)takes text only.*encoder.checkpoint to a CLIP"):
        encode(str(tmp_path), manifest, spec, ClusterConfig(), Progress(quiet=True))
    with pytest.raises(CheckpointError, match="takes text only"):
        ImageEncoder(spec)


def test_a_cluster_gives_the_same_snapshot_and_vectors(
    ray_cluster: str, folder: str, model: str, spec: EncoderSpec, tmp_path: Path
) -> None:
    from cluster import encode as cluster_encode
    from cluster import ingest as cluster_ingest
    from cluster.progress import Progress
    from cluster.session import session
    from pipelines.config import ClusterConfig

    config, quiet = ClusterConfig(workers=1, cpus_per_worker=0.8), Progress(quiet=True)
    here, _ = ingest(tmp_path / "plain", sources=[folder], part_size=3)
    with session(config):
        found = cluster_ingest.ingest(str(tmp_path / "ray"), CorpusConfig(sources=[folder], part_size=3), quiet)
        assert (found["snapshot"], found["images"]) == (here["snapshot"], True)
        manifest = cluster_encode.encode(str(tmp_path / "ray"), found, spec, config, quiet)
        rows = [("1", "a red scroll", ""), ("2", "the great library", "Alexandria")]
        texts = CorpusConfig(name="texts", sources=[write_tsv(tmp_path / "a.tsv", rows)])
        passages = cluster_ingest.ingest(str(tmp_path / "ray"), texts, quiet)
        worded = cluster_encode.encode(str(tmp_path / "ray"), passages, spec, config, quiet)
    store = cluster_encode.embedding_store(str(tmp_path / "ray"), found["snapshot"], spec)
    ours = np.concatenate([embeddings.read_vectors(store, entry, DIM) for entry in manifest["parts"]])
    text_ND, image_ND = oracle(model, ["a red scroll", "Alexandria. the great library"])
    np.testing.assert_allclose(ours, image_ND, atol=1e-5)
    store = cluster_encode.embedding_store(str(tmp_path / "ray"), passages["snapshot"], spec)
    np.testing.assert_allclose(embeddings.read_vectors(store, worded["parts"][0], DIM), text_ND, atol=1e-5)
