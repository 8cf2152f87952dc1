"""sentence-transformers bi-encoders: Transformer, Pooling, then Dense, LayerNorm and Normalize as the directory says.

Reads the hub layout (the transformer at the root) and the layout of the v0.2 zips (`0_Transformer/`). Module types
are looked up by name in a fixed table; nothing named in a checkpoint is ever imported. Texts are stripped, as the
models were trained; a passage is "title. text" unless the model was trained on another form (`Formatting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pipelines.errors import CheckpointError, ConfigError
from pipelines.models import tokens
from pipelines.models.base import EncoderInfo, Formatting, Side, Similarity, Tokens
from pipelines.models.files import read_json, refuse, require_files
from pipelines.models.modules_json import (
    Layout,
    check_weights,
    declared_prompts,
    declared_similarity,
    final_dim,
    first_module,
    read_layout,
    read_settings,
)

_OTHER_FAMILIES = ("WordEmbeddings", "CLIPModel")
_ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart")
_SETTINGS = ["sentence_bert_config.json"] + [
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions start at pad_token_id + 1
_SEGMENTS = dict.fromkeys(("bert", "albert", "electra"), 2)  # where config.json leaves type_vocab_size out
_ENDLESS = 1_000_000  # tokens; a longer model_max_length is a tokeniser's way of saying that it has none
_ALONE = "the text alone when there is no title"
_FORMATTINGS: dict[Formatting, str] = {
    "title. text": f'"title. text"; {_ALONE}',
    "title [SEP] text": f'"title [SEP] text" with the model\'s separator token; {_ALONE}',
    "title[SEP]text": f'"title[SEP]text" with the model\'s separator token; {_ALONE}',
    "pair": f"the pair (title, text); {_ALONE}",
    "text": "the text alone, without its title",
}


def recognises(checkpoint: str) -> bool:
    """Tell whether this is a directory with a modules.json that no other family reads.

    A damaged or unknown modules.json counts, so that `info` can say what is wrong with it.
    """
    first = first_module(checkpoint)
    return first is not None and first not in _OTHER_FAMILIES and not _is_cross_encoder(checkpoint)


def _is_cross_encoder(directory: str) -> bool:
    """Tell whether sentence-transformers 5 or later saved this as a CrossEncoder, which has a modules.json too."""
    try:
        return bool(read_json(directory, "config_sentence_transformers.json").get("model_type") == "CrossEncoder")
    except CheckpointError:
        return False


def info(directory: str, *, similarity: Similarity | None = None, formatting: Formatting | None = None) -> EncoderInfo:
    """Describe the encoder. Raises CheckpointError for unsupported modules, prompts or similarity, or lost files.

    similarity: overrides the checkpoint's; one saved before sentence-transformers 3 names none and counts as cosine.
    formatting: how title and text become one input; no checkpoint says it.
    """
    settings = read_settings(directory)
    layout = read_layout(directory)
    require_files(layout.first)
    check_weights(layout.first)
    config = _transformer_config(layout)
    length, _ = _lengths(layout, config)
    return EncoderInfo(
        family="sentence_transformers",
        dim=final_dim(layout, settings),
        similarity=similarity or declared_similarity(directory, settings),
        max_length=length,
        formatting=_FORMATTINGS[_formatting(formatting)],
        prompts=declared_prompts(directory, settings, layout),
        details={
            "backbone": config.get("model_type"),
            "pooling": ", ".join(layout.modes),
            "layers": [kind for kind, _ in layout.extras],
            "lower_case": _lower_case(layout),
        },
    )


def _formatting(wanted: Formatting | None) -> Formatting:
    """Return the formatting to use. Raises ConfigError for an unknown one."""
    if wanted is None:
        return "title. text"
    if wanted not in _FORMATTINGS:
        raise ConfigError(f"unknown formatting {wanted!r}", expected=", ".join(get_args(Formatting)))
    return wanted


def _transformer_config(layout: Layout) -> dict[str, Any]:
    config: dict[str, Any] = read_json(layout.first, "config.json", required=True)
    kind = config.get("model_type")
    task = _settings(layout).get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        refuse(f"a transformer for {task} is not supported", layout.first, expected="feature-extraction")
    # XLNet is trained with padding on the left and a segment of its own for its last token.
    if kind in (*_ENCODER_DECODERS, "clip", "xlnet"):
        expected = "an encoder such as BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ALBERT"
        refuse(f"a {kind} backbone is not supported", layout.first, expected=expected)
    return config


def _settings(layout: Layout) -> dict[str, Any]:
    found = (read_json(layout.first, name) for name in _SETTINGS)
    return next((settings for settings in found if settings), {})


def _lengths(layout: Layout, config: dict[str, Any]) -> tuple[int, int | None]:
    """Return (default max length, the most the position embeddings allow or None when they are relative)."""
    limit = position_limit(config)
    own = _settings(layout).get("max_seq_length")
    declared = own or read_json(layout.first, "tokenizer_config.json").get("model_max_length")
    if not isinstance(declared, int | float) or not 0 < declared <= _ENDLESS:
        declared = limit or 512
    return min(int(declared), limit) if limit else int(declared), limit


def position_limit(config: dict[str, Any]) -> int | None:
    """Return the longest input a transformer's config.json allows; None when its positions are relative."""
    limit = config.get("max_position_embeddings", 512)
    if limit is None or config.get("model_type") not in _POSITIONS_AFTER_PADDING:
        return limit
    padding = 1 if config["model_type"] == "mpnet" else int(config.get("pad_token_id", 1))  # MPNet's is a constant
    return int(limit) - padding - 1


def _lower_case(layout: Layout) -> bool | None:
    """Tell whether text is lower-cased, for `inspect`; None when the tokeniser alone decides in its own way."""
    if _settings(layout).get("do_lower_case"):
        return True
    declared = read_json(layout.first, "tokenizer_config.json").get("do_lower_case")
    return declared if isinstance(declared, bool) else None


@dataclass
class SentenceTokeniser:
    """Put title and text together, the side's prompt in front, strip, lower-case where the checkpoint asks for it.

    separator: the checkpoint's own separator token, for the two formattings that have one in the middle.
    """

    encoder: tokens.TextEncoder
    prompts: dict[str, str]
    lower_case: bool
    formatting: Formatting
    separator: str = ""

    @property
    def pad_id(self) -> int:
        return self.encoder.pad_id

    def passages(self, titles: Sequence[str], texts: Sequence[str]) -> Tokens:
        pairs = zip(titles, texts, strict=True)
        return self.encoder.encode([self._passage(title.strip(), text.strip()) for title, text in pairs])

    def queries(self, texts: Sequence[str]) -> Tokens:
        prompt = self.prompts.get("query", "")
        return self.encoder.encode([self._clean(prompt + text.strip()) for text in texts])

    def _passage(self, title: str, text: str) -> tokens.Text:
        prompt = self.prompts.get("passage", "")
        if not title or self.formatting == "text":
            return self._clean(prompt + text)
        if self.formatting == "pair":
            return self._clean(prompt + title), self._clean(text)
        if self.formatting == "title. text":
            return self._clean(prompt + tokens.join_title(title, text))
        gap = " " if self.formatting == "title [SEP] text" else ""
        # Put between the halves after lower-casing, which would spoil the token.
        return (self._clean(prompt + title) + gap + self.separator + gap + self._clean(text)).strip()

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.lower() if self.lower_case else text


def load_tokeniser(
    directory: str, max_length: int | None = None, *, formatting: Formatting | None = None
) -> SentenceTokeniser:
    """Load the tokeniser.

    formatting: "pair" suits nq-distilbert, "title [SEP] text" the facebook-dpr-* copies, "title[SEP]text" SPECTER.
    Raises ConfigError for an unknown formatting or a max_length the model has no positions for.
    """
    chosen = _formatting(formatting)
    layout = read_layout(directory)
    require_files(layout.first)
    config = _transformer_config(layout)
    backend = tokens.load_backend(layout.first)
    separator = tokens.add_separator(layout.first, backend) if "[SEP]" in chosen else ""
    length = tokens.checked_length(max_length, *_lengths(layout, config))
    segments = config.get("type_vocab_size", _SEGMENTS.get(str(config.get("model_type")), 0))
    with_types = chosen == "pair" and segments > 1
    encoder = tokens.TextEncoder(backend, tokens.pad_id(layout.first, backend), length, with_types)
    prompts = declared_prompts(directory, read_settings(directory), layout)
    return SentenceTokeniser(encoder, prompts, bool(_settings(layout).get("do_lower_case")), chosen, separator)


def load_tower(directory: str, side: Side, dtype: str, device: str, *, similarity: Similarity | None = None) -> Any:
    """Load the encoder; both sides share it. Under cosine similarity its vectors are L2-normalised.

    A Matryoshka checkpoint's vectors are cut to its truncate_dim first. Raises CheckpointError when the weights are
    incomplete, damaged or do not fit the configs.
    """
    from transformers import MODEL_MAPPING

    from pipelines.models.tower import EncoderTower, load_layers
    from pipelines.models.weights import build_model, read_config, read_weights

    described = info(directory, similarity=similarity)
    layout = read_layout(directory)
    config = read_config(layout.first)
    if type(config) not in MODEL_MAPPING:
        refuse(f"a {config.model_type} backbone is not supported", layout.first)
    state = read_weights(layout.first)
    backbone = build_model(MODEL_MAPPING[type(config)], config, state, dtype, layout.first)
    width = getattr(config, "hidden_size", layout.width)
    if width != layout.width:
        refuse(f"the pooling is {layout.width} wide, the transformer {width}", directory)
    layers = load_layers(layout.extras, read_settings(directory).get("truncate_dim"))
    normalise = described.similarity == "cosine"
    return EncoderTower(backbone, described.dim, layout.modes, layers, normalise=normalise).on(device)
