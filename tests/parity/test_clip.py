"""CLIP in its three layouts against transformers' CLIPModel, its image processor, and sentence-transformers."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from pipelines.errors import CheckpointError, ConfigError, InputError
from pipelines.models import FAMILIES, clip, describe, find_family, kind_of
from pipelines.pixels import PixelRule, open_image, read_rule
from tests.checkpoints import write_dpr, write_sentence_transformer
from tests.checkpoints.clip import (
    DIM,
    IMAGE_SIZE,
    MAX_TOKENS,
    byte_pieces,
    clip_state,
    merges,
    openai_state,
    pieces,
    preprocessor,
    write_hub_clip,
    write_openai_clip,
)
from tests.parity.towers import close, embed, rows

TEXTS = [
    "A photo of the Library of Alexandria",
    "",
    "  a red   SCROLL\n",
    "who wrote it??",
    "café n\u0303 9,787 \U0001f600",
    "it's <|endoftext|> the king's",
    "the river " * 100,
    "a red scroll",
]
START, END = len(pieces()) - 2, len(pieces()) - 1


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same weights in every layout, in fp32."""
    root = tmp_path_factory.mktemp("clip")
    return {
        "OpenAI": write_openai_clip(str(root / "openai"), dtype="float32"),
        "hub": write_hub_clip(str(root / "hub")),
        "plain": write_hub_clip(str(root / "plain"), modules=False, weights="safetensors"),
    }


def texts_of(directory: str, texts: list[str], **options: Any) -> Any:
    tokeniser = clip.load_tokeniser(directory)
    tower = clip.load_tower(directory, "query", "fp32", "cpu", **options)
    return embed(tower, tokeniser.queries(texts), tokeniser.pad_id)


def pictures() -> dict[str, bytes]:
    """Return small image files of every kind that behaves in its own way."""
    from PIL import Image

    rng = np.random.default_rng(3)
    base = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).resize((90, 61))
    ramp = Image.fromarray(np.linspace(0, 255, 90 * 61).reshape(61, 90).astype(np.uint8))
    clear = base.copy()
    clear.putalpha(ramp)
    palette = base.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "rgb.png": (base, "PNG", {}),
        "photo.jpg": (base, "JPEG", {}),
        "tall.png": (base.resize((33, 120)), "PNG", {}),
        "small.png": (base.resize((5, 9)), "PNG", {}),
        "alpha.png": (clear, "PNG", {}),
        "palette.gif": (palette, "GIF", {}),
        "hole.png": (palette, "PNG", {"transparency": 3}),
        "grey.png": (ramp, "PNG", {}),
        "grey-alpha.png": (clear.convert("LA"), "PNG", {}),
        "bits.png": (ramp.convert("1"), "PNG", {}),
        "cmyk.jpg": (base.convert("CMYK"), "JPEG", {}),
        "turned.jpg": (base, "JPEG", {"exif": turned}),
        "web.webp": (base, "WEBP", {"lossless": True}),
        "map.bmp": (base, "BMP", {}),
        "scan.tif": (base, "TIFF", {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16)), "PNG", {}),
    }
    found = {}
    for name, (image, kind, options) in kinds.items():
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        found[name] = sink.getvalue()
    return found


def processed(images: list[bytes], **settings: Any) -> Any:
    """Return what transformers' processor makes of upright pictures."""
    from PIL import Image, ImageOps
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(**(preprocessor() | settings))
    upright = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))) for data in images]
    return processor(upright, return_tensors="pt")["pixel_values"]


def oracle_model(directory: str) -> Any:
    import torch
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("layout", ["OpenAI", "hub", "plain"])
def test_texts_equal_transformers(layouts: dict[str, str], layout: str, parity: Callable[..., None]) -> None:
    """The oracle reads one text at a time from Hugging Face's files: no padding."""
    import torch
    from transformers import CLIPTokenizer

    tokeniser, model = CLIPTokenizer.from_pretrained(layouts["plain"]), oracle_model(layouts["plain"])
    ids = [tokeniser(text, truncation=True, max_length=MAX_TOKENS)["input_ids"] for text in TEXTS]
    with torch.inference_mode():
        raw = torch.cat([model.get_text_features(torch.tensor([row])).pooler_output for row in ids])
    assert rows(clip.load_tokeniser(layouts[layout]).queries(TEXTS)) == ids
    unit = torch.nn.functional.normalize(raw, dim=1).numpy()
    parity("CLIP text", layout, "transformers CLIPModel", texts_of(layouts[layout], TEXTS), unit)
    plain = texts_of(layouts[layout], TEXTS, similarity="dot")
    assert close(plain / np.abs(raw.numpy()).max(), raw.numpy() / np.abs(raw.numpy()).max())
    assert np.linalg.norm(plain, axis=1).min() > 1.5  # not normalised on disk


def test_texts_equal_sentence_transformers(layouts: dict[str, str], parity: Callable[..., None]) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(layouts["hub"], device="cpu", local_files_only=True)
    expected = theirs.encode(TEXTS, normalize_embeddings=True)
    parity("CLIP text", "hub", "sentence-transformers", texts_of(layouts["hub"], TEXTS), expected)


@pytest.mark.parametrize("layout", ["OpenAI", "hub", "plain"])
def test_images_equal_transformers(layouts: dict[str, str], layout: str, parity: Callable[..., None]) -> None:
    import torch

    files = list(pictures().values())
    with torch.inference_mode():
        raw = oracle_model(layouts["plain"]).get_image_features(processed(files)).pooler_output
    unit = torch.nn.functional.normalize(raw, dim=1).numpy()
    tower = clip.load_image_tower(layouts[layout], "fp32", "cpu")
    parity("CLIP images", layout, "transformers CLIPModel", tower.encode_images(files), unit)
    assert (tower.dim, tower.num_tokens) == (DIM, 17)
    for batch in (1, 3, 100):
        assert close(tower.encode_images(files[::-1], batch)[::-1], unit)
    assert tower.encode_images([]).shape == (0, DIM)


@pytest.mark.parametrize("name", sorted(pictures()))
def test_pixels_are_the_processors_bit_for_bit(name: str) -> None:
    data = pictures()[name]
    ours = read_rule(preprocessor(), IMAGE_SIZE, "here")(open_image(data))
    assert ours.dtype == np.float32
    assert np.array_equal(ours, processed([data])[0].numpy())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"resample": 2, "do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {"size": 45},
    ],
)
def test_pixel_settings_are_followed(settings: dict[str, Any]) -> None:
    data = [pictures()[name] for name in ("tall.png", "photo.jpg", "small.png")]
    rule = read_rule(preprocessor() | settings, IMAGE_SIZE, "here")
    # A number as `size` is the short edge, as in CLIP's feature extractor and in its processor's default.
    assert np.array_equal(np.stack([rule(open_image(d)) for d in data]), processed(data, **settings).numpy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 224, "crop_size": 224}, r"makes pictures of \(224, 224\) pixels"),
        ({"size": 16}, r"without padding"),
        ({"do_center_crop": False}, "any size"),
        ({"image_mean": [0.5]}, "cannot be followed"),
        ({"size": {"longest_edge": 9}}, "cannot be followed"),
        ({"crop_size": "large"}, "cannot be followed"),
    ],
)
def test_pixel_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_rule(preprocessor() | settings, IMAGE_SIZE, "here")


def test_released_images_are_224_wide() -> None:
    rule = read_rule({}, 224, "here")
    assert rule == PixelRule()
    assert rule(open_image(pictures()["tall.png"])).shape == (3, 224, 224)


# Tokens


def own_bpe(text: str) -> list[int]:
    """Tokenise as Radford et al. describe it: byte pairs of lower-cased words, the earliest merge first."""
    ids, ranks, bytes_of = {p: i for i, p in enumerate(pieces())}, {m: i for i, m in enumerate(merges())}, byte_pieces()
    printable = [b for b in range(256) if 33 <= b <= 126 or (b >= 161 and b != 173)]
    order = printable + [b for b in range(256) if b not in printable]
    character = {byte: bytes_of[place] for place, byte in enumerate(order)}
    found = []
    for word in regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", text.lower()):
        symbols = [character[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
            # every occurrence of the best pair, from the left
            best, at, merged = min(pairs, key=ranks.__getitem__), 0, []
            while at < len(symbols):
                if tuple(symbols[at : at + 2]) == best:
                    merged.append(symbols[at] + symbols[at + 1])
                    at += 2
                else:
                    merged.append(symbols[at])
                    at += 1
            symbols = merged
        found += [ids[symbol] for symbol in symbols]
    return [START, *found[: MAX_TOKENS - 2], END]


@pytest.mark.parametrize("layout", ["OpenAI", "hub"])
def test_token_ids_are_those_of_byte_pair_encoding(layouts: dict[str, str], layout: str) -> None:
    texts = [
        "Who WROTE the book?!",
        "it's 9,787 rivers'",
        "Ägypten straße",
        "\U0001f600 ok",
        "librarylibrary",
        "x " * 90,
    ]
    assert rows(clip.load_tokeniser(layouts[layout]).queries(texts)) == [own_bpe(text) for text in texts]


@pytest.mark.parametrize("layout", ["OpenAI", "hub", "plain"])
def test_a_fixed_sentence(layouts: dict[str, str], layout: str) -> None:
    tokeniser = clip.load_tokeniser(layouts[layout])
    (row,) = rows(tokeniser.queries(["  A Photo of the LIBRARY!! "]))
    names = [pieces()[index] for index in row]
    assert names == ["<|startoftext|>", "a</w>", "pho", "to</w>", "of</w>", "the</w>", "library</w>", "!", "!</w>",
                     "<|endoftext|>"]  # fmt: skip
    assert (row[0], row[-1]) == (START, END)
    assert rows(tokeniser.queries(["", "?"])) == [[START, END], [START, 256 + 30, END]]
    assert len(tokeniser.queries([])) == 0


def test_long_texts_keep_their_end_and_titles_come_first(layouts: dict[str, str]) -> None:
    tokeniser = clip.load_tokeniser(layouts["hub"])
    long, short = rows(tokeniser.queries(["war " * 400, "war"]))
    assert (len(long), long[0], long[-1]) == (MAX_TOKENS, START, END)
    assert long[1:-1] == [short[1]] * (MAX_TOKENS - 2)
    (cut,) = rows(clip.load_tokeniser(layouts["hub"], 16).queries(["war " * 400]))
    assert (len(cut), cut[-1]) == (16, END)
    with_title, joined = rows(tokeniser.passages([" Alexandria ", ""], [" a city ", "Alexandria. a city"]))
    assert with_title == joined
    with pytest.raises(ConfigError, match="max_length 78"):
        clip.load_tokeniser(layouts["hub"], 78)
    assert tokeniser.queries(["\U0001f600 war " * 100_000]).lengths.tolist() == [MAX_TOKENS]


def test_unicode_forms_and_spaces_are_one_text(layouts: dict[str, str]) -> None:
    for layout in ("OpenAI", "hub"):
        composed, decomposed, spaced = rows(
            clip.load_tokeniser(layouts[layout]).queries(["é a", "e\u0301 a", " é \t a"])
        )
        assert composed == decomposed == spaced


def test_padding_batching_and_order_do_not_matter(layouts: dict[str, str]) -> None:
    tokeniser, tower = clip.load_tokeniser(layouts["hub"]), clip.load_tower(layouts["hub"], "passage", "fp32", "cpu")
    together = embed(tower, tokeniser.queries(TEXTS), tokeniser.pad_id)
    some = [0, 1, 2, 3, 5]
    padded = embed(tower, tokeniser.queries([TEXTS[i] for i in some]), tokeniser.pad_id, extra=30)
    as_end = embed(tower, tokeniser.queries([TEXTS[i] for i in some]), END, extra=30)  # what transformers pads with
    alone = np.concatenate([embed(tower, tokeniser.queries([text]), tokeniser.pad_id) for text in TEXTS])
    assert close(padded, together[some])
    assert close(as_end, together[some])
    assert close(embed(tower, tokeniser.queries(TEXTS[::-1]), tokeniser.pad_id)[::-1], together)
    assert close(alone, together)
    assert not close(together[0], together[3], 0.01)


def test_the_tokeniser_pickles_without_its_directory(tmp_path: Path) -> None:
    for write in (write_openai_clip, write_hub_clip):
        directory = write(str(tmp_path / write.__name__))
        tokeniser = clip.load_tokeniser(directory)
        shutil.rmtree(directory)
        assert rows(pickle.loads(pickle.dumps(tokeniser)).queries(TEXTS)) == rows(tokeniser.queries(TEXTS))


# Precision


def test_fp16_files_load_as_asked(tmp_path: Path, layouts: dict[str, str]) -> None:
    """Halves are what OpenAI published: both layouts of the same halves agree in fp32, and are near the full ones."""
    halves = {name: a.astype(np.float16).astype(np.float32) for name, a in clip_state().items()}
    openai = write_openai_clip(str(tmp_path / "o"), dtype="float16")
    hub = write_hub_clip(str(tmp_path / "h"), dtype="float16")
    full = write_hub_clip(str(tmp_path / "f"), state=halves)
    expected = texts_of(full, TEXTS)
    assert close(texts_of(openai, TEXTS), expected)
    assert close(texts_of(hub, TEXTS), expected)
    assert close(texts_of(layouts["hub"], TEXTS), expected, 2e-2)
    tower = clip.load_tower(openai, "query", "fp32", "cpu")
    assert {str(p.dtype) for p in tower.parameters()} == {"torch.float32"}
    assert not tower.training
    low = clip.load_image_tower(openai, "bf16", "cpu")
    files = list(pictures().values())
    assert str(low.backbone.dtype) == "torch.bfloat16"
    cosine = (low.encode_images(files) * clip.load_image_tower(full, "fp32", "cpu").encode_images(files)).sum(axis=1)
    assert cosine.min() > 0.98
    assert low.encode_images(files).dtype == np.float32


def test_a_config_that_names_the_end_token_is_read_as_well(tmp_path: Path, layouts: dict[str, str]) -> None:
    named = write_hub_clip(str(tmp_path / "named"), eos_token_id=END)
    assert close(texts_of(named, TEXTS), texts_of(layouts["hub"], TEXTS))
    wrong = write_hub_clip(str(tmp_path / "wrong"), eos_token_id=7)
    with pytest.raises(CheckpointError, match=rf"ends texts with {END}, the model reads them at 7"):
        clip.load_tower(wrong, "query", "fp32", "cpu")


# What it is


def test_only_clip_is_recognised(tmp_path: Path, layouts: dict[str, str]) -> None:
    assert {kind_of(directory) for directory in layouts.values()} == {("clip", "encoder")}
    assert clip.recognises(layouts["OpenAI"] + "/0_CLIPModel")
    (tmp_path / "notes.txt").write_text("CLIP")
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text('{"model_type": "clip"')
    half = write_hub_clip(str(tmp_path / "half"), modules=False)
    config = json.loads((tmp_path / "half/config.json").read_text())
    (tmp_path / "half/config.json").write_text(json.dumps(config | {"architectures": ["CLIPForImageClassification"]}))
    others = [write_dpr(str(tmp_path / "dpr"), "query"), write_sentence_transformer(str(tmp_path / "st")), half,
              str(damaged), str(tmp_path / "empty"), str(tmp_path / "notes.txt"), str(tmp_path / "absent")]  # fmt: skip
    assert [clip.recognises(other) for other in others] == [False] * len(others)
    written = [name for name in FAMILIES if importlib.util.find_spec(f"pipelines.models.{name}")]
    families = {name: importlib.import_module(f"pipelines.models.{name}") for name in written}
    for directory in layouts.values():
        assert [name for name, family in families.items() if family.recognises(directory)] == ["clip"]


def test_info_says_what_it_is(layouts: dict[str, str]) -> None:
    for layout, directory in layouts.items():
        described: Any = describe(directory)
        assert (described.dim, described.similarity, described.max_length) == (DIM, "cosine", MAX_TOKENS)
        assert described.details["layout"] == ("OpenAI" if layout == "OpenAI" else "Hugging Face")
        assert (described.details["image_size"], described.details["images"]) == (IMAGE_SIZE, True)
        assert clip.accepts_images(directory)
        assert find_family(directory) is clip  # type: ignore[comparison-overlap]
    assert clip.info(layouts["hub"], similarity="dot").similarity == "dot"
    with pytest.raises(ConfigError, match="one input format"):
        clip.info(layouts["hub"], formatting="pair")


def test_describing_the_plain_layout_imports_nothing_heavy(layouts: dict[str, str], tmp_path: Path) -> None:
    import subprocess
    import sys

    from transformers import CLIPTokenizer

    directory = shutil.copytree(layouts["plain"], tmp_path / "fast")
    CLIPTokenizer.from_pretrained(str(directory)).backend_tokenizer.save(str(directory / "tokenizer.json"))
    code = (
        "import sys; from pipelines.models import clip\n"
        f"assert clip.recognises({str(directory)!r}) and clip.info({str(directory)!r}).dim == {DIM}\n"
        f"t = clip.load_tokeniser({str(directory)!r}).queries(['a photo'])\n"
        "print(t.ids.tolist(), [m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    expected = rows(clip.load_tokeniser(layouts["plain"]).queries(["a photo"]))[0]
    assert done.stdout.strip() == f"{expected} []"


def test_text_works_without_pillow_and_images_say_how_to_get_it(
    layouts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    expected = texts_of(layouts["OpenAI"], TEXTS[:2])
    for name in [name for name in sys.modules if name == "PIL" or name.startswith("PIL.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert close(texts_of(layouts["OpenAI"], TEXTS[:2]), expected)
    with pytest.raises(ConfigError, match=r"(?s)Pillow.*pinakes\[images\]"):
        clip.load_image_tower(layouts["OpenAI"], "fp32", "cpu")


def test_a_damaged_image_is_an_error_with_its_reason(layouts: dict[str, str]) -> None:
    tower = clip.load_image_tower(layouts["hub"], "fp32", "cpu")
    for data, message in ((b"", "empty"), (b"text", "not an image"), (pictures()["photo.jpg"][:300], "cut short")):
        with pytest.raises(InputError, match=message):
            tower.encode_images([pictures()["rgb.png"], data])


# Refusals


def _weights(**changes: Any) -> dict[str, Any]:
    """Return OpenAI's tensors with some replaced, or left out (None)."""
    state = openai_state(clip_state()) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: array for name, array in state.items() if array is not None}


def test_openai_layouts_that_are_wrong_are_refused(tmp_path: Path) -> None:
    import torch

    def refused(match: str, directory: str) -> None:
        assert clip.recognises(directory)
        with pytest.raises(CheckpointError, match=match):
            clip.load_tower(directory, "query", "fp32", "cpu")

    wrong = tmp_path / "wrong"
    refused("lack visual.proj", write_openai_clip(str(wrong), state=_weights(visual__proj=None)))
    block = "visual__transformer__resblocks__1__attn__in_proj_bias"
    refused(r"lack vision_model.encoder.layers.1.self_attn.k_proj.bias",
            write_openai_clip(str(wrong), state=_weights(**{block: None})))  # fmt: skip
    refused("hold unexpected extra.thing", write_openai_clip(str(wrong), state=_weights(extra__thing=np.ones(3))))
    resnet = _weights(visual__layer1__0__conv1__weight=np.ones(3), visual__proj=None)
    refused("ResNet", write_openai_clip(str(wrong), state=resnet))
    shorter = openai_state(clip_state())["positional_embedding"][:, :32]
    refused("do not fit", write_openai_clip(str(wrong), state=_weights(positional_embedding=shorter)))
    file = Path(write_openai_clip(str(wrong))) / "0_CLIPModel/CLIPModel.pt"
    file.write_bytes(file.read_bytes()[:5000])
    refused("damaged", str(wrong))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what OpenAI published is old
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    refused("TorchScript archive, which holds code", str(wrong))
    file.write_bytes(pickle.dumps(_Harmful(str(tmp_path / "harm")), protocol=2))
    refused("damaged or holds code", str(wrong))
    assert not (tmp_path / "harm").exists()
    torch.save({"epoch": 3, "model": {}}, file)
    refused("no state dict", str(wrong))
    file.unlink()
    refused(r"there is no CLIPModel\.pt", str(wrong))
    (file.parent / "config.json").write_text('{"model_name": "../CLIPModel.pt", "tokenizer_name": "b"}')
    refused("names no weights of its own folder", str(wrong))


class _Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_merges_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = write_openai_clip(str(tmp_path))
    file = tmp_path / "0_CLIPModel/bpe_simple_vocab_16e6.txt.gz"
    whole = file.read_bytes()
    lines = gzip.decompress(whole).decode().split("\n")
    file.write_bytes(gzip.compress("\n".join(lines[:20]).encode()))
    with pytest.raises(CheckpointError, match=rf"holds 19 of the {len(merges())} merges"):
        describe(directory)
    for content in (whole[:200], b"not gzip at all"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="merges cannot be read"):
            describe(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"BPE merges are missing"):
        describe(directory)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("visual_projection.weight", "lack visual_projection.weight"),
        ("text_model.embeddings.position_embedding.weight", "lack text_model.embeddings.position_embedding"),
        ("vision_model.encoder.layers.1.mlp.fc1.bias", "lack vision_model.encoder.layers.1.mlp.fc1.bias"),
        ("logit_scale", "lack logit_scale"),
    ],
)
def test_hub_layouts_that_lack_a_tensor_are_refused(tmp_path: Path, left_out: str, message: str) -> None:
    state = {name: array for name, array in clip_state().items() if name != left_out}
    directory = write_hub_clip(str(tmp_path), state=state, weights="safetensors")
    with pytest.raises(CheckpointError, match=message):
        clip.load_tower(directory, "query", "fp32", "cpu")


def test_hub_layouts_that_are_wrong_are_refused(tmp_path: Path) -> None:
    directory = write_hub_clip(str(tmp_path), weights="safetensors")
    folder, file = tmp_path / "0_CLIPModel", tmp_path / "0_CLIPModel/model.safetensors"
    whole = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            clip.load_tower(directory, "query", "fp32", "cpu")

    file.write_bytes(whole[:-100])
    refused("cut off")
    file.unlink()
    refused("no weights")
    file.write_bytes(whole)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor() | {"crop_size": 224, "size": 224}))
    with pytest.raises(CheckpointError, match="the vision tower takes"):
        clip.load_image_tower(directory, "fp32", "cpu")
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    refused(re.escape("modules.json lists CLIPModel, Dense"))
    (tmp_path / "modules.json").write_text(json.dumps([modules[0] | {"path": "../elsewhere"}]))
    refused("points outside")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").unlink()
    refused("no tokeniser")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused("holds none")


def test_the_digest_covers_weights_and_merges(tmp_path: Path) -> None:
    """Two OpenAI checkpoints with other weights or another vocabulary never share an embedding folder."""
    from pipelines.models import checkpoint_digest

    directory = write_openai_clip(str(tmp_path))
    digests = {checkpoint_digest(directory)}
    write_openai_clip(directory, seed=1)
    digests.add(checkpoint_digest(directory))
    file = tmp_path / "0_CLIPModel/bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"l i", b"l j")))
    assert len(digests | {checkpoint_digest(directory)}) == 3


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model_name", "CLIPModel.pth"),
        ("model_name", "pytorch_model.bin"),  # model.safetensors is beside it
        ("tokenizer_name", "merges.txt.gz"),
    ],
)
def test_files_that_the_digest_leaves_out_are_refused(tmp_path: Path, key: str, name: str) -> None:
    directory = write_openai_clip(str(tmp_path))
    folder = tmp_path / "0_CLIPModel"
    config = json.loads((folder / "config.json").read_text())
    (folder / config[key]).rename(folder / name)
    (folder / "config.json").write_text(json.dumps(config | {key: name}))
    (folder / "model.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match=f"digest leaves out {re.escape(name)}") as caught:
        describe(directory)
    assert config[key] in caught.value.expected


def test_weights_beside_openais_do_not_hide_them(tmp_path: Path) -> None:
    """A model.safetensors in the folder is not what this layout loads."""
    from pipelines.models import checkpoint_digest

    digests = set()
    for seed in range(2):
        directory = write_openai_clip(str(tmp_path), seed=seed)
        (tmp_path / "0_CLIPModel/model.safetensors").write_text("x")
        digests.add(checkpoint_digest(directory))
    assert len(digests) == 2
